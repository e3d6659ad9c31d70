"""
Adapters that owners of text bring, and the base that they must have been trained on. Flat: the file travels to the Hub
as it is.

Shape suffixes: r rank, I and O widths of a layer's input and output.
"""

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file, is_peft_available, requires_backends

from .adapters_fedmoe import peft_config_dict
from .configuration_fedmoe_causal import FedMoECausalConfig
from .lora_fedmoe_causal import TargetLayer, layer_sizes


if is_peft_available():
    from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
    from peft.utils.other import SAFETENSORS_WEIGHTS_NAME

# As PEFT saves them.
_KEY = "base_model.model.{layer}.lora_{matrix}.weight"


@torch.no_grad()
def base_sha256(base: PreTrainedModel) -> str:
    """
    Computes by what a base is known again: the SHA-256 of the names, shapes and values of its parameters, rounded to
    bfloat16, so that a base in float32 and the same one loaded in bfloat16 agree.

    Args:
        base (`PreTrainedModel`): The decoder; adapters in it do not count.

    Returns:
        `str`: Hexadecimal.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(base.named_parameters()):
        if "owners" in name.split("."):
            continue
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        value = weight.detach().to(torch.bfloat16) if weight.is_floating_point() else weight.detach()
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_same_base(place: str, found: str | None, expected: str | None) -> None:
    """Raises a `ValueError` when what is named `place` belongs to a base with another hash; `None` is not compared."""
    if found and expected and found != expected:
        raise ValueError(
            f"`{place}` belongs to a base with `base_sha256` {found!r}, but this one has {expected!r}: take the base "
            "that it was made with, in the same revision, not trained further, and in float32 or bfloat16 both times."
        )


def read_adapter(
    adapter: "str | os.PathLike | PeftModel | Mapping[str, Tensor]",
    targets: Mapping[str, TargetLayer],
    config: FedMoECausalConfig,
) -> dict[str, tuple[Tensor, Tensor]]:
    """
    Reads a LoRA adapter of PEFT for the layers of a mixture.

    Args:
        adapter (`str`, `os.PathLike`, `PeftModel` or `Mapping[str, torch.Tensor]`):
            A folder or Hub name (safetensors only), a model with the adapter active, or its tensors under PEFT's
            names.
        targets (`Mapping[str, nn.Module]`):
            The layers that experts change, by name.
        config ([`FedMoECausalConfig`]):
            Of the mixture.

    Returns:
        For each layer `lora_A`, `(r, I)`, and `lora_B`, `(O, r)`.

    Raises:
        `ValueError`: If the adapter is of another kind, rank, scale or base; names the field, value and remedy.
    """
    if isinstance(adapter, Mapping):
        tensors = dict(adapter)
    elif isinstance(adapter, (str, os.PathLike)):
        requires_backends(read_adapter, ["peft"])
        _check_adapter_config(peft_config_dict(PeftConfig.from_pretrained(str(adapter))), config)
        file = cached_file(adapter, SAFETENSORS_WEIGHTS_NAME)
        assert file is not None  # or it has raised
        tensors = load_file(file)
    elif is_peft_available() and isinstance(adapter, PeftModel):
        name = adapter.active_adapter
        _check_adapter_config(peft_config_dict(adapter.peft_config[name]), config)
        tensors = get_peft_model_state_dict(adapter, adapter_name=name, save_embedding_layers=False)
    else:
        raise ValueError(
            f"`adapter` is a {type(adapter).__name__}: pass a folder, a name, a `PeftModel`, or its tensors."
        )
    expected = {}
    for layer, module in targets.items():
        inputs, outputs = layer_sizes(module)
        expected[_KEY.format(layer=layer, matrix="A")] = (config.lora_rank, inputs)
        expected[_KEY.format(layer=layer, matrix="B")] = (outputs, config.lora_rank)
    for key in sorted(expected.keys() | tensors.keys()):
        found = tuple(tensors[key].shape) if key in tensors else "nothing"
        if found != expected.get(key, "nothing"):
            raise ValueError(
                f"`adapter` has {found} as `{key}`, where the mixture takes {expected.get(key, 'nothing')}: train it "
                "on this base with the mixture's `lora_rank` and `target_modules`."
            )
        if not tensors[key].isfinite().all():
            raise ValueError(f"`adapter` is not finite at `{key}`: train it with a lower learning rate.")
    return {
        layer: (tensors[_KEY.format(layer=layer, matrix="A")], tensors[_KEY.format(layer=layer, matrix="B")])
        for layer in targets
    }


def _check_adapter_config(found: dict[str, Any], config: FedMoECausalConfig) -> None:
    if found["peft_type"] != "LORA":
        raise ValueError(f"`adapter.peft_type` is {found['peft_type']!r}: experts are LoRA adapters, train one.")
    for field in ("rank_pattern", "alpha_pattern", "modules_to_save"):
        if found.get(field):
            raise ValueError(
                f"`adapter.{field}` is {found[field]!r}: experts have one rank and scale, and no layers of their own. "
                "Leave it out."
            )
    rank, alpha = found["r"], found["lora_alpha"]
    scale = alpha / rank**0.5 if found.get("use_rslora") else alpha / rank
    if rank != config.lora_rank or scale != config.lora_alpha / config.lora_rank:
        raise ValueError(
            f"`adapter.r` is {rank} and its scale {scale}, where the mixture has `lora_rank` {config.lora_rank} and "
            f"the scale {config.lora_alpha / config.lora_rank}: train it with `r={config.lora_rank}` and "
            f"`lora_alpha={config.lora_alpha}`, or give `from_base` these values."
        )


def write_adapter(
    folder: str | os.PathLike,
    matrices: Mapping[str, tuple[Tensor, Tensor]],
    targets: Mapping[str, TargetLayer],
    config: FedMoECausalConfig,
) -> None:
    """
    Writes one expert as PEFT does.

    Args:
        folder (`str` or `os.PathLike`): Made if needed.
        matrices (`Mapping[str, tuple[torch.Tensor, torch.Tensor]]`): As from [`read_adapter`].
        targets (`Mapping[str, nn.Module]`): The layers that experts change, by name.
        config ([`FedMoECausalConfig`]): Of the mixture.
    """
    requires_backends(write_adapter, ["peft"])
    LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # PEFT computes with any number
        target_modules=list(targets),
        fan_in_fan_out=all(isinstance(layer, Conv1D) for layer in targets.values()),
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.base_revision,
        inference_mode=True,
    ).save_pretrained(str(folder))
    tensors = {}
    for layer, pair in matrices.items():
        for matrix, value in zip("AB", pair, strict=True):
            tensors[_KEY.format(layer=layer, matrix=matrix)] = value.detach().cpu().contiguous()
    save_file(tensors, os.path.join(folder, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
