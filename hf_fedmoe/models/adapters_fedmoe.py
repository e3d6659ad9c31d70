"""
Experts as PEFT adapters of one frozen base: what the mixture and the federation need beside PEFT itself. Flat: the
file travels to the Hub as it is, and PEFT is needed for checkpoints with adapters only.
"""

import copy
import enum
import itertools
import os
from collections.abc import Iterator
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file, is_peft_available, logging

from .configuration_checks import AutoClassifier
from .precision_fedmoe import cast_where_types_meet, to_float32_


if is_peft_available():
    from peft import (
        PeftConfig,
        PeftModel,
        get_peft_config,
        get_peft_model_state_dict,
        set_peft_model_state_dict,
    )
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import SAFETENSORS_WEIGHTS_NAME, AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    class _HeadsBySlices(ModulesToSaveWrapper):
        """Heads of any kind in a batch that is sorted by adapter: PEFT mixes heads of a single layer only."""

        def _mixed_batch_forward(self, input: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
            runs = [(name, len(list(run))) for name, run in itertools.groupby(adapter_names)]
            shares = input.split([size for _, size in runs])
            heads = [self.modules_to_save[name] for name, _ in runs]
            return torch.cat([head(share, *args, **kwargs) for head, share in zip(heads, shares, strict=True)])


# What decides which version of a checkpoint's files is read, and what concerns a base that is loaded by its name.
SOURCE_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
BASE_ARGUMENTS = (
    "attn_implementation",
    "device_map",
    "dtype",
    "max_memory",
    "quantization_config",
    "trust_remote_code",
)
# What concerns a model that is loaded by its name. (Files of a base in a subfolder would not be found again.)
LOADING_ARGUMENTS = (*BASE_ARGUMENTS, *(name for name in SOURCE_ARGUMENTS if name != "subfolder"))

PEFT_TYPES = ("LORA", "IA3")
# More than the width of the layers of any model: adapters are built in memory before weights are read.
MAX_RANK = 2**16
# Facts about where an adapter came from.
ADAPTERS_MAY_DIFFER = frozenset(
    {"peft_version", "inference_mode", "task_type", "lora_dropout", "auto_mapping", "revision"}
)
# Other starts (PiSSA, OLoRA, EVA, ...) take the adapter's start out of the base: the base would not be the named one.
LORA_STARTS = (True, "gaussian", "orthogonal")


def source_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Picks those of `from_pretrained` that decide which version of a checkpoint's files is read."""
    return {name: kwargs[name] for name in SOURCE_ARGUMENTS if name in kwargs}


def base_arguments(kwargs: dict[str, Any], source: dict[str, Any]) -> dict[str, Any]:
    """Picks those that concern a base loaded by its name, whose revision and folder are not the experts' `source`."""
    picked = {name: kwargs[name] for name in BASE_ARGUMENTS if name in kwargs}
    return picked | {name: value for name, value in source.items() if name not in ("revision", "subfolder")}


def peft_config_dict(config: "dict[str, Any] | PeftConfig") -> dict[str, Any]:
    """
    The configuration of adapters as it is written to `config.json`; sets and enumerations become plain.

    Raises:
        `ValueError`: If experts cannot be adapters of this kind; names the field, its value and the remedy.
    """
    if not isinstance(config, (dict, PeftConfig)):
        raise ValueError(f"`peft_config` is {config!r}: pass a `LoraConfig`, an `IA3Config`, or one as a `dict`.")
    values = dict(config) if isinstance(config, dict) else config.to_dict()
    for name, value in values.items():
        if isinstance(value, enum.Enum):
            values[name] = value.value
        elif isinstance(value, (set, frozenset)):
            values[name] = sorted(value)
    _check_peft_config(values)
    return values


def _check_peft_config(values: dict[str, Any]) -> None:
    kind = values.get("peft_type")
    if kind not in PEFT_TYPES:
        raise ValueError(
            f"`peft_config.peft_type` is {kind!r}: experts can be adapters of the types {', '.join(PEFT_TYPES)}, pass "
            "a `LoraConfig` or an `IA3Config`."
        )
    targets = values.get("target_modules")
    if targets is not None and not isinstance(targets, (str, list)):
        raise ValueError(f"`peft_config.target_modules` is {targets!r}: pass a list of names of layers.")
    if kind == "IA3":
        return
    if values.get("use_dora"):
        raise ValueError(
            "`peft_config.use_dora` is True: DoRA's magnitudes are no linear function of the update, so that clients' "
            "adapters have no exact average. Leave it out (LoRA), or use rank-stabilised LoRA, `use_rslora=True`."
        )
    ranks = {
        "r": values.get("r", 8),
        **{f"rank_pattern[{k!r}]": v for k, v in (values.get("rank_pattern") or {}).items()},
    }
    for name, rank in ranks.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
            raise ValueError(f"`peft_config.{name}` is {rank!r}: pass a rank of at least 1 and at most {MAX_RANK}.")
    if values.get("bias", "none") != "none":
        raise ValueError(
            f"`peft_config.bias` is {values['bias']!r}: it would train the base's biases, which all experts share. "
            "Pass `bias='none'`."
        )
    if values.get("init_lora_weights", True) not in LORA_STARTS:
        raise ValueError(
            f"`peft_config.init_lora_weights` is {values['init_lora_weights']!r}, which changes the base: pass one of "
            f"{', '.join(map(repr, LORA_STARTS))}."
        )


def with_adapters(
    base: PreTrainedModel, config: dict[str, Any], names: list[str], kind: "type[PeftModel] | None" = None
) -> "PeftModel":
    """
    Puts one adapter for each name into `base`, all with the same start, each with a classification head of its own.
    They are float32, the base stays of its type.

    Args:
        base (`PreTrainedModel`): A classifier; frozen and changed in place.
        config (`dict[str, Any]`): From [`peft_config_dict`].
        names (`list[str]`): Of the adapters.
        kind (`type[PeftModel]`, *optional*, defaults to `PeftModel`): Of the result.

    Raises:
        `ValueError`: If the base keeps running statistics, or has none of the configuration's `target_modules`.
    """
    for name, module in base.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            raise ValueError(
                f"`{name}` of the {type(base).__name__} keeps running statistics, which adapters would share and "
                "every client change: take a base without BatchNorm (BERT, GPT-2, ViT, ConvNeXt), or whole experts."
            )
    heads = [
        name
        for name, child in base.named_children()
        if name != base.base_model_prefix and any(True for _ in child.parameters())
    ]
    for name, parameter in base.named_parameters():
        if name.split(".")[0] in heads and not parameter.is_floating_point():
            raise ValueError(
                f"`{name}` of the {type(base).__name__} is quantized, but every expert trains a head of its own: pass "
                f"`llm_int8_skip_modules={heads}` in the `quantization_config`."
            )
    _check_target_modules(base, config.get("target_modules"))
    config = {**config, "modules_to_save": sorted({*(config.get("modules_to_save") or []), *heads})}
    # The plain class passes every input on; those for tasks know texts only.
    peft_model = (kind or PeftModel)(base, get_peft_config(config), names[0])
    if "fan_in_fan_out" in config:  # PEFT corrects it for `Conv1D`, in the first adapter's configuration only
        config["fan_in_fan_out"] = vars(peft_model.peft_config[names[0]])["fan_in_fan_out"]
    start = adapter_tensors(peft_model, names[0])
    for name in names[1:]:
        peft_model.add_adapter(name, get_peft_config(config))
        # Averages of adapters need a common start, and PEFT draws each by itself.
        with torch.no_grad():
            for key, tensor in adapter_tensors(peft_model, name).items():
                tensor.copy_(start[key])
    for name in names:
        to_float32_(adapter_tensors(peft_model, name).values())
    cast_where_types_meet(peft_model)
    train_adapters_only(peft_model, names)
    for module in peft_model.modules():
        if any(tensor.requires_grad for tensor in module.parameters(recurse=False)):
            # transformers' own mark, which torch's stub knows nothing of
            module._is_hf_initialized = True  # type: ignore[assignment]  # or `post_init` draws each of them anew
        if isinstance(module, ModulesToSaveWrapper):
            module.__class__ = _HeadsBySlices
    return peft_model


def _check_target_modules(base: PreTrainedModel, targets: list[str] | str | None) -> None:
    # PEFT says nothing of names that are missing beside others, and does not name them when all are.
    if not isinstance(targets, list):
        return
    names = [name for name, _ in base.named_modules()]
    missing = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)]
    if missing:
        layers = sorted(
            {name.split(".")[-1] for name, module in base.named_modules() if isinstance(module, nn.Linear)}
        )
        raise ValueError(
            f"`peft_config.target_modules` has {missing}, and the {type(base).__name__} has no such layers; among its "
            f"linear layers are {layers[:8]}. Name layers of this base, or leave `target_modules` to PEFT."
        )


def train_adapters_only(peft_model: "PeftModel", names: list[str]) -> None:
    """Freezes all but the adapters `names` and their heads. Loading needs it too: it makes every parameter anew."""
    own = ids_of_adapters(peft_model, names)
    for parameter in peft_model.parameters():
        parameter.requires_grad_(id(parameter) in own)


def ids_of_adapters(peft_model: nn.Module, names: list[str]) -> set[int]:
    """The identities of all tensors of the adapters `names` and their heads."""
    return {id(tensor) for name in names for tensor in adapter_tensors(peft_model, name).values()}


def adapter_tensors(peft_model: nn.Module, name: str) -> dict[str, Tensor]:
    """Parameters and buffers of one adapter and its heads, under their names less the adapter's."""
    found = {}
    for key, tensor in peft_model.state_dict(keep_vars=True).items():
        parts = key.split(".")
        if name in parts:
            parts.remove(name)
            found[".".join(parts)] = tensor
    return found


def switchable(peft_model: nn.Module) -> "Iterator[BaseTunerLayer | AuxiliaryTrainingWrapper]":
    """The layers that hold several adapters or heads and run one of them."""
    return (
        module for module in peft_model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    )


def activate(peft_model: "PeftModel", name: str) -> None:
    """Makes `name` the adapter that runs. PEFT's `set_adapter` would also take the others' gradients away."""
    if len(peft_model.peft_config) > 1:
        for module in switchable(peft_model):
            module._active_adapter = [name]


def adapter_submodule(peft_model: "PeftModel", path: str, name: str) -> nn.Module:
    """The submodule at `path` of the original base that runs with adapter `name`: heads exist once for each."""
    module: nn.Module = peft_model.get_base_model()
    for part in path.split("."):
        module = module.get_submodule(part)
        if isinstance(module, ModulesToSaveWrapper):
            module = module.modules_to_save[name]
    return module


class AdapterExpert(nn.Module):
    """
    One adapter over a shared base, seen as a classifier of its own: it runs the base with its adapter, and its state
    (parameters, buffers, `state_dict`) is the adapter and its heads alone.

    Args:
        peft_model (`PeftModel`): The base with its adapters; shared, not copied.
        name (`str`): Of the adapter.
    """

    def __init__(self, peft_model: "PeftModel", name: str) -> None:
        super().__init__()
        # In a tuple, so that the base is no part of this module's state.
        self._shared = (peft_model,)
        self.name = name
        self.adapter = nn.Module()
        self.training = peft_model.training
        for key, tensor in adapter_tensors(peft_model, name).items():
            *places, leaf = key.split(".")
            holder = self.adapter
            for place in places:
                if place not in holder._modules:
                    holder.add_module(place, nn.Module())
                holder = holder.get_submodule(place)
            if isinstance(tensor, nn.Parameter):
                holder.register_parameter(leaf, tensor)
            else:
                holder.register_buffer(leaf, tensor)

    @property
    def peft_model(self) -> "PeftModel":
        """The base with its adapters."""
        return self._shared[0]

    @property
    def base(self) -> PreTrainedModel:
        """The base without PEFT's wrapper."""
        base = self.peft_model.get_base_model()
        assert isinstance(base, PreTrainedModel)
        return base

    @property
    def config(self) -> PreTrainedConfig:
        """The base's configuration."""
        return self.base.config

    @property
    def main_input_name(self) -> str:
        """The base's main input."""
        return self.base.main_input_name

    @property
    def device(self) -> torch.device:
        """The device of the base."""
        return self.base.device

    @property
    def dtype(self) -> torch.dtype:
        """The base's type."""
        return self.base.dtype

    def train(self, mode: bool = True) -> "AdapterExpert":
        """Also of the base, which the other adapters share."""
        self.peft_model.train(mode)
        return super().train(mode)

    def forward(self, **inputs: Any) -> Any:
        """The base's output with this adapter."""
        activate(self.peft_model, self.name)
        return self.base(**inputs)

    def copy(self) -> "AdapterExpert":
        """An expert with an adapter of its own over a tree of its own, whose frozen tensors are those of this one."""
        own = {id(tensor) for tensor in self.state_dict(keep_vars=True).values()}
        memo = {}
        for tensor in [*self.peft_model.parameters(), *self.peft_model.buffers()]:
            memo[id(tensor)] = tensor
            if id(tensor) in own:
                clone = tensor.detach().clone()
                memo[id(tensor)] = (
                    nn.Parameter(clone, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else clone
                )
        # First, so that removing the others changes neither what is active nor whose gradients are on.
        activate(self.peft_model, self.name)
        tree = copy.deepcopy(self.peft_model, memo)
        for other in [name for name in tree.peft_config if name != self.name]:
            tree.delete_adapter(other)
        return AdapterExpert(tree, self.name)


def as_expert(model: nn.Module) -> nn.Module:
    """`model`, or the active adapter of a `PeftModel` as an [`AdapterExpert`]."""
    if is_peft_available() and isinstance(model, PeftModel):
        return AdapterExpert(model, model.active_adapter)
    return model


def load_base(
    auto_class: AutoClassifier | type[AutoModelForCausalLM], name: str, config: PreTrainedConfig, **arguments: Any
) -> PreTrainedModel:
    """Loads the base of that name or folder. Its own head, which may be missing or another, is never used."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # of the head that it lacks
    try:
        return auto_class.from_pretrained(
            name,
            config=config,
            ignore_mismatched_sizes=True,
            use_safetensors=True,
            **{key: value for key, value in arguments.items() if value is not None},
        )
    finally:
        logging.set_verbosity(verbosity)


def read_adapter_configs(sources: list[str | os.PathLike]) -> dict[str, Any]:
    """The one configuration of saved adapters; raises a `ValueError` that names the first difference between two."""
    first, *others = (peft_config_dict(PeftConfig.from_pretrained(str(source))) for source in sources)
    for source, other in zip(sources[1:], others, strict=True):
        for key in sorted((first.keys() | other.keys()) - ADAPTERS_MAY_DIFFER):
            if first.get(key) != other.get(key):
                raise ValueError(
                    f"The adapters differ in `{key}`: {first.get(key)!r} in {str(sources[0])!r}, {other.get(key)!r} "
                    f"in {str(source)!r}. Experts of one mixture are adapters of one base, with one rank and one set "
                    "of target modules."
                )
    return first


def load_adapter(expert: AdapterExpert, source: str | os.PathLike) -> None:
    """Loads a saved PEFT adapter into an expert; raises `ValueError` when it is an adapter of something else."""
    # Not PEFT's own loader: it takes pickles too.
    file = cached_file(source, SAFETENSORS_WEIGHTS_NAME)
    assert file is not None  # or it has raised
    tensors = load_file(file, device=str(expert.device))
    own = get_peft_model_state_dict(expert.peft_model, adapter_name=expert.name)
    for key in sorted(own.keys() | tensors.keys()):
        found, expected = (tuple(state[key].shape) if key in state else "nothing" for state in (tensors, own))
        if found != expected:
            raise ValueError(
                f"The adapter {str(source)!r} has {found} as `{key}`, the base takes {expected}: pass the base that "
                "it was trained on, with its `num_labels`."
            )
    set_peft_model_state_dict(expert.peft_model, tensors, adapter_name=expert.name)


def merged_expert(peft_model: "PeftModel", name: str) -> PreTrainedModel:
    """A whole classifier: a copy of the base, and of its type, into which one adapter is merged."""
    tree = copy.deepcopy(peft_model)
    tree.set_adapter(name)
    for other in [other for other in tree.peft_config if other != name]:
        tree.delete_adapter(other)
    base = tree.get_base_model()
    assert isinstance(base, PreTrainedModel)
    for path, module in list(base.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):  # IA3 merges heads of a single layer only
            base.set_submodule(path, module.modules_to_save[name].to(base.dtype))
    return tree.merge_and_unload()
