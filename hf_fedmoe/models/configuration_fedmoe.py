"""Configuration of the server Mixture-of-Experts. Flat: the file travels to the Hub as it is."""

import copy
import os
from typing import Any, ClassVar

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.configuration_utils import SubConfigSpec
from transformers.dynamic_module_utils import custom_object_save, get_class_from_dynamic_module
from transformers.utils import logging

from .adapters_fedmoe import peft_config_dict, source_arguments
from .configuration_checks import (
    MAX_MODULES,
    AutoClassifier,
    built,
    check_choice,
    check_classifier_config,
    check_integer,
    check_labels,
    check_number,
    check_weights,
    class_names,
)


logger = logging.get_logger(__name__)

GATES = ("main_features", "model", "adapter")
# A `config.json` must not ask for more memory than a head of many classes takes.
MAX_PROTOTYPES = 100_000
TOP_L_WEIGHTINGS = ("softmax", "renormalize")
MIXES = ("probabilities", "logits")

# Held in the sub-configurations too: a later change at the top has to reach the sub-models.
_SHARED_FIELDS = frozenset({"id2label", "label2id", "pad_token_id", "num_routed_experts", "gate_prototypes"})


# Facts about where a configuration came from, or that `FedMoEConfig` sets: experts may differ in them.
_IGNORED_CONFIG_KEYS = frozenset(
    ("_name_or_path", "architectures", "auto_map", "dtype", "pad_token_id", "problem_type", "transformers_version")
)


class FedMoEConfig(PreTrainedConfig):
    r"""
    Configuration of a [`FedMoEForSequenceClassification`] or [`FedMoEForImageClassification`]: one to three main
    experts, `num_routed_experts` routed experts of the same architecture, a gate and a learnable weight `alpha`
    (Fed-MoE, IJCAI 2025).

    Sub-configurations are copied, so that the ones passed in stay as they are. The number of labels, their names and
    the padding token are kept equal in the model, its experts and its gate.

    Args:
        expert_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration that every expert shares; a `dict` needs a `model_type`. Defaults to a `BertConfig`.
        gate_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the gate, a classifier with `num_routed_experts * gate_prototypes` labels. Only with
            `gate="model"`.
        gate (`str`, *optional*, defaults to `"main_features"`):
            `"model"` for a gate that is a classifier of its own, `"main_features"` for a linear layer on the pooled
            features of the first main expert, `"adapter"` for one on the features of the base with an adapter of the
            gate's own (only with `peft_config`).
        gate_prototypes (`int`, *optional*, defaults to 1):
            Scores that the gate has for each routed expert, whose logsumexp counts: with one for each class a linear
            gate can know what each class looks like to each expert.
        num_routed_experts (`int`, *optional*, defaults to 3):
            Number K of routed experts, at most 1024: each is a model, or an adapter, in memory.
        num_main_experts (`int`, *optional*, defaults to 1):
            Number of main experts, 0 to 3. Without one, the model is the routed part alone.
        top_l (`int`, *optional*, defaults to 1):
            Number L of routed experts that an example is sent to at inference.
        top_l_weighting (`str`, *optional*, defaults to `"softmax"`):
            Weights of the L chosen experts: `"softmax"` of their gate probabilities (Eq. 10 of the paper) or
            `"renormalize"`, the gate probabilities divided by their sum.
        mix (`str`, *optional*, defaults to `"probabilities"`):
            What is mixed, the experts' `"probabilities"` (Eq. 1) or their `"logits"`.
        initial_alpha (`float`, *optional*, defaults to 0.5):
            Start value in (0, 1) of the weight of the routed part.
        entropy_weight (`float`, *optional*, defaults to 0.001):
            Weight (beta) of the gating entropy in the training loss (Eq. 9).
        balance_weight (`float`, *optional*, defaults to 0.0):
            Weight of the load imbalance, KL(mean gate || uniform), in the training loss.
        peft_config (`dict` or `PeftConfig`, *optional*):
            A `LoraConfig` or `IA3Config` of PEFT: experts are then adapters of one frozen base of `expert_config`,
            with a classification head each. With its `base_model_name_or_path` (and `revision`) set, saved files hold
            the base by that name only.
        pad_token_id (`int`, *optional*):
            Padding token. Defaults to the expert's, then to its end-of-sequence token.
        num_labels (`int`, *optional*), id2label, label2id:
            As in every Hugging Face classifier. Default to the expert's.

    Raises:
        `ValueError`: If a value is out of its range or the sub-configurations contradict one another.

    Example:

    ```python
    >>> from transformers import GPT2Config
    >>> config = FedMoEConfig(expert_config=GPT2Config(n_layer=2), num_routed_experts=5, num_labels=4)
    >>> config.expert_config.num_labels
    4
    ```
    """

    model_type = "fedmoe"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["gate_probs", "selected_experts", "expert_logits"]
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "expert_config": SubConfigSpec(config_class=AutoConfig, model_type="bert"),
        "gate_config": SubConfigSpec(config_class=AutoConfig, model_type="bert", optional=True),
    }

    expert_config: dict | PreTrainedConfig | None = None
    gate_config: dict | PreTrainedConfig | None = None
    gate: str = "main_features"
    gate_prototypes: int = 1
    num_routed_experts: int = 3
    num_main_experts: int = 1
    top_l: int = 1
    top_l_weighting: str = "softmax"
    mix: str = "probabilities"
    initial_alpha: float = 0.5
    entropy_weight: float = 1e-3
    balance_weight: float = 0.0
    peft_config: dict | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        check_labels(kwargs.get("num_labels"), self.id2label, self.label2id)
        for field in ("expert_config", "gate_config"):
            check_classifier_config(field, vars(self)[field])
        # One object given twice (expert and gate), or kept by the caller, must not be changed from here.
        self.expert_config = copy.deepcopy(self.expert_config)
        self.gate_config = copy.deepcopy(self.gate_config)
        if self.peft_config is not None:
            self.peft_config = peft_config_dict(self.peft_config)
        if self.id2label is None and self.label2id is not None:
            self.id2label = {int(index): label for label, index in self.label2id.items()}
        given_labels = self.id2label is not None or kwargs.get("num_labels") is not None
        super().__post_init__(**kwargs)
        if not given_labels:
            self.id2label = class_names(built(self.expert_config))
        if self.label2id is None or {int(index): label for label, index in self.label2id.items()} != self.id2label:
            self.label2id = {label: index for index, label in class_names(self).items()}
        self.validate()
        self._synchronize()

    def __setattr__(self, key: str, value: Any) -> None:
        super().__setattr__(key, value)
        if key in _SHARED_FIELDS and "_post_init_done" in self.__dict__:
            self._synchronize()

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """
        Saves the configuration; the source files of experts and gates that transformers does not know go beside it.

        Args:
            save_directory (`str` or `os.PathLike`):
                Folder, made if needed.
            push_to_hub, kwargs:
                As in `PreTrainedConfig.save_pretrained`.
        """
        # Saving a model notes its own Auto class here first: experts and gate are built through the same one.
        auto_classes = [name for name in getattr(self, "auto_map", None) or () if name != "AutoConfig"]
        for config in self._sub_configs():
            if not config.is_remote_code():
                continue
            os.makedirs(save_directory, exist_ok=True)
            custom_object_save(config, save_directory, config=config)  # type: ignore[arg-type]  # declared a dict
            for name in auto_classes:
                model_class = getattr(transformers, name)._model_mapping.get(type(config), None)
                if model_class is not None and model_class.is_remote_code():
                    # Asks an object for its class, module and Auto class only: no need to build the model.
                    model = model_class.__new__(model_class)
                    custom_object_save(model, save_directory, config=config)  # type: ignore[arg-type]  # as above
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads as `PreTrainedConfig` does; as remote code, fetches that of experts which transformers lacks too."""
        source = source_arguments(kwargs)
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        # Running from a checkpoint's own files, this code was trusted together with its neighbours. An installed
        # package was not asked to trust anything, and must not run them.
        if __name__.startswith("transformers_modules."):
            for key in cls.sub_configs_defaults:
                _register_custom_code(config_dict.get(key), pretrained_model_name_or_path, source)
        return config_dict, kwargs

    def _synchronize(self) -> None:
        """Carries labels, number of experts and padding token over to the sub-configurations."""
        expert, *gates = self._sub_configs()
        expert.id2label = class_names(self)
        expert.label2id = {label: int(index) for label, index in (self.label2id or {}).items()}
        for gate in gates:
            if gate.num_labels != self.num_routed_experts * self.gate_prototypes:
                gate.num_labels = self.num_routed_experts * self.gate_prototypes

        pad_token_id = self.pad_token_id if self.pad_token_id is not None else self._inherited_pad_token_id()
        self.__dict__["pad_token_id"] = pad_token_id
        for sub_config in (expert, *gates):
            text_config = sub_config.get_text_config()
            if pad_token_id is not None and vocabulary_size(sub_config) is not None:
                text_config.pad_token_id = pad_token_id
        # Those of the experts: a `Trainer` aligns them with the tokenizer, and warns of what it must change.
        for name in ("bos_token_id", "eos_token_id"):
            if getattr(self, name, None) is None:
                setattr(self, name, getattr(expert.get_text_config(), name, None))

    def _sub_configs(self) -> list[PreTrainedConfig]:
        """Builds the configuration of the experts, and that of the gate if it has one."""
        return [built(self.expert_config), *([] if self.gate_config is None else [built(self.gate_config)])]

    def _inherited_pad_token_id(self) -> int | None:
        for sub_config in self._sub_configs():
            if vocabulary_size(sub_config) is not None:
                pad_token_id = getattr(sub_config.get_text_config(), "pad_token_id", None)
                if pad_token_id is not None:
                    return pad_token_id
        expert = built(self.expert_config)
        size, eos_token_id = vocabulary_size(expert), getattr(expert.get_text_config(), "eos_token_id", None)
        if isinstance(eos_token_id, (list, tuple)):
            eos_token_id = eos_token_id[0] if eos_token_id else None
        # An id outside the vocabulary (GPT-2's default in a small model) would never be found in the inputs.
        if size is None or eos_token_id is None or not 0 <= eos_token_id < size:
            return None
        logger.warning_once(
            f"The {expert.model_type} experts have no padding token: their end-of-sequence token "
            f"({eos_token_id}) is used. Pass `pad_token_id` to `FedMoEConfig` to choose another one."
        )
        return eos_token_id

    def validate(self) -> None:
        """
        Checks every field against its range and against the others.

        Raises:
            `ValueError`: Naming the field, its value and the remedy.
        """
        super().validate()  # type: ignore[misc]  # a decorator of `huggingface_hub` makes it
        for field, low in (("num_routed_experts", 1), ("num_main_experts", 0), ("top_l", 1)):
            check_integer(field, getattr(self, field), low, MAX_MODULES)
        check_integer("gate_prototypes", self.gate_prototypes, 1, MAX_PROTOTYPES)
        if self.num_main_experts > 3:
            raise ValueError(f"`num_main_experts` is {self.num_main_experts}: pass 0, 1, 2 or 3.")
        if self.top_l > self.num_routed_experts:
            raise ValueError(
                f"`top_l` is {self.top_l}, but there are only {self.num_routed_experts} routed experts: lower `top_l` "
                "or raise `num_routed_experts`."
            )
        for field, allowed in (("gate", GATES), ("top_l_weighting", TOP_L_WEIGHTINGS), ("mix", MIXES)):
            check_choice(field, getattr(self, field), allowed)
        for field in ("initial_alpha", "entropy_weight", "balance_weight"):
            check_number(field, getattr(self, field))
        if not 0 < self.initial_alpha < 1:
            raise ValueError(
                f"`initial_alpha` is {self.initial_alpha!r}: pass a number between 0 and 1, both excluded "
                "(alpha is stored as a logit)."
            )
        for field in ("entropy_weight", "balance_weight"):
            value = getattr(self, field)
            if not 0 <= value < float("inf"):
                raise ValueError(f"`{field}` is {value!r}: pass a finite number of at least 0 (0 turns the term off).")
        self._validate_sub_configs()

    def _validate_sub_configs(self) -> None:
        size = vocabulary_size(built(self.expert_config))
        if self.pad_token_id is not None:
            check_integer("pad_token_id", self.pad_token_id, -1)
        if self.pad_token_id is not None and size is not None and self.pad_token_id >= size:
            raise ValueError(
                f"`pad_token_id` is {self.pad_token_id}, but the experts' tokens are 0 to {size - 1} (`vocab_size`): "
                "pass the tokenizer's `pad_token_id`."
            )
        if self.gate == "main_features" and self.num_main_experts == 0:
            raise ValueError(
                "`gate` is 'main_features', which reads a main expert, but `num_main_experts` is 0: pass "
                "`gate='model'` with a `gate_config`, or have a main expert."
            )
        if self.gate != "model" and self.gate_config is not None:
            raise ValueError(
                f"`gate_config` is a {built(self.gate_config).model_type} configuration, but `gate` is {self.gate!r}, "
                "which is a linear layer without one: pass `gate='model'`, or leave `gate_config` out."
            )
        if self.gate == "adapter" and self.peft_config is None:
            raise ValueError(
                "`gate` is 'adapter', but `peft_config` is None: pass the configuration of the adapters as "
                "`peft_config`, or `gate='main_features'`."
            )
        if self.gate == "model" and self.gate_config is None:
            raise ValueError(
                "`gate` is 'model', but `gate_config` is None: pass the configuration of a classifier as "
                "`gate_config`, or `gate='main_features'`."
            )
        if self.problem_type not in (None, "single_label_classification"):
            raise ValueError(
                f"`problem_type` is {self.problem_type!r}: experts are mixed as probabilities of exclusive classes, "
                "leave it out or pass 'single_label_classification'."
            )
        if len(class_names(self)) < 2:
            raise ValueError(f"`num_labels` is {self.num_labels}: pass at least 2 classes.")
        if self.gate_config is not None:
            expert_size, gate_size = map(vocabulary_size, self._sub_configs())
            if expert_size is not None and gate_size is not None and expert_size != gate_size:
                raise ValueError(
                    f"`gate_config.vocab_size` is {gate_size}, but `expert_config.vocab_size` is {expert_size}: the "
                    "gate and the experts read the same token ids, so take a gate with the experts' tokenizer, or "
                    "`gate='main_features'`."
                )


def _register_custom_code(config: dict[str, Any] | None, place: str | os.PathLike, source: dict[str, Any]) -> None:
    """Registers the classes that a sub-configuration of an unknown type names, from the files at `place`."""
    if not config or not config.get("auto_map") or config.get("model_type") in CONFIG_MAPPING:
        return
    references = dict(config["auto_map"])
    config_class: type[PreTrainedConfig] = get_class_from_dynamic_module(references.pop("AutoConfig"), place, **source)
    config_class.register_for_auto_class()
    AutoConfig.register(config["model_type"], config_class)
    for name, reference in references.items():
        model_class: type[PreTrainedModel] = get_class_from_dynamic_module(reference, place, **source)
        model_class.register_for_auto_class(name)
        getattr(transformers, name).register(config_class, model_class)


def vocabulary_size(config: PreTrainedConfig) -> int | None:
    """Size of the vocabulary that `config`'s model reads, `None` for a model without tokens."""
    return getattr(config.get_text_config(), "vocab_size", None)


def check_classifier(place: str, model: PreTrainedModel, auto_class: AutoClassifier) -> None:
    """Raises unless `model` (named `place` in the message) is what `auto_class` builds."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"`{place}` is a {type(model).__name__}: pass a checkpoint's name or path, or a `PreTrainedModel` (an "
            "adapter has to be merged first, with `merge_and_unload()`)."
        )
    expected = auto_class._model_mapping.get(type(model.config), None)
    kinds = expected if isinstance(expected, tuple) else (expected,)
    if not isinstance(model, tuple(kind for kind in kinds if kind is not None)):
        raise ValueError(
            f"`{place}` is a {type(model).__name__}, which is not what {auto_class.__name__} builds: load it with "
            f"`{auto_class.__name__}.from_pretrained`."
        )
    check_weights(place, model)


def check_equal_configs(first_place: str, first: PreTrainedModel, place: str, other: PreTrainedModel) -> None:
    """Raises a `ValueError` that names the first difference between two experts' configurations."""
    if other is first:
        return
    if type(other) is not type(first):
        raise ValueError(
            f"`{first_place}` is a {type(first).__name__}, but `{place}` is a {type(other).__name__}: all experts "
            "must have one architecture."
        )
    first_config, other_config = first.config.to_dict(), other.config.to_dict()
    for key in sorted((first_config.keys() | other_config.keys()) - _IGNORED_CONFIG_KEYS):
        ours, theirs = first_config.get(key), other_config.get(key)
        if ours != theirs:
            raise ValueError(
                f"The experts' configurations differ in `{key}`: {ours!r} in `{first_place}`, {theirs!r} in "
                f"`{place}`. All experts must have one architecture."
            )


def check_equal_states(place: str, source: PreTrainedModel, target: PreTrainedModel) -> None:
    """Raises a `ValueError` that names the first tensor of `source` that does not fit into `target`."""
    found = {name: (tuple(t.shape), t.dtype) for name, t in source.state_dict().items()}
    expected = {name: (tuple(t.shape), t.dtype) for name, t in target.state_dict().items()}
    for name in [*expected, *found]:
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"`{place}` has {found.get(name, 'nothing')} as `{name}`, where its configuration and the first "
                f"expert's type give {expected.get(name, 'nothing')}: all experts must be unmodified models of one "
                "architecture and type (merge adapters first, convert with `.to(dtype)`)."
            )
