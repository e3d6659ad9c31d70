"""Configuration of the mixture of owners of text. Flat: the file travels to the Hub as it is."""

import copy
import difflib
from collections.abc import Iterable
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .adapters_fedmoe import MAX_RANK
from .configuration_checks import MAX_MODULES, built, check_choice, check_integer, check_number, check_sizes


ROUTERS = ("ridge",)
# The name of expert 0, which is the base without an adapter.
BASE_NAME = "base"


class FedMoECausalConfig(PreTrainedConfig):
    r"""
    Configuration of a [`FedMoEForCausalLM`]: a frozen decoder, a LoRA expert for each owner of text, and a router in
    closed form that reads the running mean of the token embeddings.

    Args:
        base_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the decoder; a `dict` needs a `model_type`. Copied. Defaults to a `GPT2Config`.
        owners (`list[dict]`, *optional*):
            Facts about the owner of each expert, in the experts' order: a `name`, and whatever else a card should
            say (`licence`, `tokens`, `members` of a group that shares the expert). A `str` is taken for a name.
            Expert 0 is the base, and nobody's.
        router_names (`list[str]`, *optional*):
            Names of the owners, and `"base"`, whose statistics the router has. The others have no weight.
        lora_rank (`int`, *optional*, defaults to 32):
            Rank r of every expert.
        lora_alpha (`float`, *optional*, defaults to 64):
            An expert's update is `lora_alpha / lora_rank * B A`.
        target_modules (`list[str]`, *optional*):
            Names of the linear layers that experts change, or ends of names. Defaults to those of the feed-forward
            blocks (what lies in a module `mlp`).
        router (`str`, *optional*, defaults to `"ridge"`):
            `"ridge"` for ridge regression of the owner on the running mean.
        ridge (`float`, *optional*, defaults to 0.01):
            Penalty of the regression, in units of the mean diagonal of the Gram matrix.
        router_temperature (`float`, *optional*, defaults to 0.1):
            The weights are `softmax(scores / router_temperature)`.
        public_bias (`float`, *optional*, defaults to 0.1):
            Added to the base's score, where the router knows public text. Public text is of many kinds and lies
            between the owners', where a linear score is seldom the highest; with more of it owners' text stays with
            the base too.
        top_l (`int`, *optional*):
            Number L of experts, the base among them, that keep their weight at a position, renormalised. All of them
            if left out.
        base_model_name_or_path (`str`, *optional*):
            Name of the base, where saved files hold it by this name only.
        base_revision (`str`, *optional*):
            Its revision.
        base_sha256 (`str`, *optional*):
            From [`base_sha256`], of the base's weights; a base that is loaded by its name must have them.

    Raises:
        `ValueError`: If a value is out of its range; names the field, the value and the remedy.

    Example:

    ```python
    >>> from transformers import GPT2Config
    >>> config = FedMoECausalConfig(base_config=GPT2Config(n_layer=2), owners=["court", "press"])
    >>> config.expert_names
    ['base', 'court', 'press']
    ```
    """

    model_type = "fedmoe_causal"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values"]
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "base_config": SubConfigSpec(config_class=AutoConfig, model_type="gpt2"),
    }

    base_config: dict | PreTrainedConfig | None = None
    owners: list[dict[str, Any]] | None = None
    router_names: list[str] | None = None
    lora_rank: int = 32
    lora_alpha: float = 64
    target_modules: list[str] | None = None
    router: str = "ridge"
    ridge: float = 0.01
    router_temperature: float = 0.1
    public_bias: float = 0.1
    top_l: int | None = None
    base_model_name_or_path: str | None = None
    base_revision: str | None = None
    base_sha256: str | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        check_base_config(self.base_config)
        self.base_config = copy.deepcopy(self.base_config)
        self.owners = owners_as_dicts(self.owners)
        self.router_names = _list_of_names("router_names", self.router_names or [])
        if self.target_modules is not None:
            self.target_modules = _list_of_names("target_modules", self.target_modules)
        super().__post_init__(**kwargs)
        text_config = built(self.base_config).get_text_config()
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if vars(self)[name] is None:
                setattr(self, name, getattr(text_config, name, None))
        self.validate()

    @property
    def expert_names(self) -> list[str]:
        """Names of the K + 1 experts: the base, then the owners."""
        return [BASE_NAME, *(owner["name"] for owner in self.owners or ())]

    def expert_index(self, expert: int | str) -> int:
        """
        Looks an expert up.

        Args:
            expert (`int` or `str`): Its index, 0 for the base, or its owner's name, `"base"` for the base.

        Raises:
            `ValueError`: If there is no such expert.
        """
        names = self.expert_names
        if isinstance(expert, str):
            if expert not in names:
                near = difflib.get_close_matches(expert, names, n=1)
                hint = f"did you mean {near[0]!r}? The experts are" if near else "pass one of"
                raise ValueError(f"`expert` is {expert!r}: {hint} {names}.")
            return names.index(expert)
        check_integer("expert", expert, 0, len(names) - 1)
        return expert

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """Returns the base's configuration: vocabulary, layers and kinds of attention are the base's."""
        return built(self.base_config).get_text_config(decoder=decoder, encoder=encoder)

    def validate(self) -> None:
        """
        Checks every field against its range and against the others.

        Raises:
            `ValueError`: Naming the field, its value and the remedy.
        """
        super().validate()  # type: ignore[misc]  # a decorator of `huggingface_hub` makes it
        num_owners = len(self.expert_names) - 1
        if num_owners > MAX_MODULES:
            raise ValueError(f"`owners` has {num_owners} entries: pass at most {MAX_MODULES}.")
        unknown = sorted(set(self.router_names or ()) - set(self.expert_names))
        if unknown:
            raise ValueError(f"`router_names` has {unknown}: pass names of `owners`, or {BASE_NAME!r}.")
        if built(self.base_config).get_text_config() is not self.base_config:
            raise ValueError(
                f"`base_config` is a {type(self.base_config).__name__}, whose model reads more than text: pass the "
                "configuration of a decoder alone, its `text_config`."
            )
        check_integer("lora_rank", self.lora_rank, 1, MAX_RANK)
        for field in ("lora_alpha", "ridge", "router_temperature"):
            value = vars(self)[field]
            check_number(field, value)
            if not 0 < value < float("inf"):
                raise ValueError(f"`{field}` is {value!r}: pass a finite number above 0.")
        check_number("public_bias", self.public_bias)
        if not -1e6 < self.public_bias < 1e6:
            raise ValueError(f"`public_bias` is {self.public_bias!r}: pass a finite number, around 0.1.")
        check_choice("router", self.router, ROUTERS)
        if self.target_modules == []:
            raise ValueError("`target_modules` is []: name linear layers, or leave it out for the feed-forward ones.")
        if self.top_l is not None:
            check_integer("top_l", self.top_l, 1, MAX_MODULES + 1)
        for field in ("base_model_name_or_path", "base_revision", "base_sha256"):
            value = vars(self)[field]
            if value is not None and not isinstance(value, str):
                raise ValueError(f"`{field}` is {value!r}: pass a `str`, or leave it out.")


def check_base_config(config: Any) -> None:
    """
    Raises a `ValueError` unless `config` can be that of a decoder of transformers. Called before a `dict` becomes a
    configuration, which nested ones would do to any depth.
    """
    if config is None:
        return
    if not isinstance(config, (dict, PreTrainedConfig)):
        raise ValueError(f"`base_config` is {config!r}: pass the configuration of a causal language model.")
    values = config if isinstance(config, dict) else vars(config)
    model_type = values.get("model_type") if isinstance(config, dict) else config.model_type
    if config and model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(
            f"`base_config.model_type` is {model_type!r}, which `AutoModelForCausalLM` of transformers does not know: "
            "pass the configuration of a decoder, for example a `GPT2Config` or a `LlamaConfig`."
        )
    check_sizes("base_config", values)


def owners_as_dicts(owners: Any) -> list[dict[str, Any]]:
    """Copies of the entries of `owners`, names made entries; raises a `ValueError` that names what is none."""
    if owners is None:
        return []
    if isinstance(owners, (str, dict)) or not isinstance(owners, Iterable):
        raise ValueError(f"`owners` is {owners!r}: pass a list of names, or of a `dict` with a `name` each.")
    entries = [{"name": entry} if isinstance(entry, str) else entry for entry in owners]
    names = set()
    for place, entry in enumerate(entries):
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name:
            raise ValueError(f"`owners[{place}]` is {entry!r}: pass a name, or a `dict` with a `name`.")
        if name == BASE_NAME or name in names:
            raise ValueError(
                f"`owners[{place}]` is named {name!r}, which is "
                f"{'what the base is called' if name == BASE_NAME else 'taken'}: give it another name."
            )
        names.add(name)
    return copy.deepcopy(entries)


def _list_of_names(field: str, names: Any) -> list[str]:
    if isinstance(names, str) or not isinstance(names, Iterable) or not all(isinstance(n, str) for n in names):
        raise ValueError(f"`{field}` is {names!r}: pass a list of names.")
    return list(names)
