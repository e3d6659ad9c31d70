"""
Adapters in float32 over a base that is stored in half precision. Flat: the file travels to the Hub as it is.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import is_peft_available


if is_peft_available():
    from peft import PeftModel
    from peft.utils.other import ModulesToSaveWrapper

HALF_PRECISION = (torch.float16, torch.bfloat16)


@torch.no_grad()
def to_float32_(tensors: Iterable[Tensor]) -> int:
    """
    Makes tensors of half precision float32, in place; parameters stay the objects that they are, so that ties and
    views by name hold. Other types are left alone.

    Args:
        tensors (`Iterable[Tensor]`): Parameters and buffers.

    Returns:
        `int`: Bytes of memory that they take more.
    """
    added = 0
    for tensor in tensors:
        if tensor.dtype in HALF_PRECISION:
            tensor.data = tensor.data.float()
            added += tensor.numel() * 2
    return added


def cast_where_types_meet(peft_model: "PeftModel") -> None:
    """
    Has a base run with adapters and heads of another type than its own: inputs are cast to the type of the weights
    that read them, and what a trained copy inside the base gives out, to that of the layers behind it. PEFT casts
    inside of LoRA and IA3 layers only. Without effect where all types are alike.

    Args:
        peft_model (`PeftModel`): Changed in place; calling it again changes nothing.
    """
    base = peft_model.get_base_model()
    cast_inputs_of(base)
    for path, module in base.named_modules():
        if isinstance(module, nn.LayerNorm | nn.GroupNorm) and _type_of(module) in HALF_PRECISION:
            # Autocast leaves these alone on CPUs, and hands bf16 to those of an fp16 base.
            cast_inputs_of(module)
        if not isinstance(module, ModulesToSaveWrapper):
            continue
        for trained in module.modules_to_save.values():
            cast_inputs_of(trained)
        # A head is the end: its scores may be more exact than what it read.
        inside = path.split(".")[0] == base.base_model_prefix
        if inside and _cast_output not in module._forward_hooks.values():
            module.register_forward_hook(_cast_output)


def cast_inputs_of(module: nn.Module) -> None:
    """Has a module cast what it reads to the type of its weights."""
    if _cast_inputs not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_cast_inputs, with_kwargs=True)


def _type_of(module: nn.Module) -> torch.dtype | None:
    return next((parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()), None)


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() and dtype else value


def _cast_inputs(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    dtype = _type_of(module)
    return tuple(_cast(value, dtype) for value in args), {name: _cast(value, dtype) for name, value in kwargs.items()}


def _cast_output(module: "ModulesToSaveWrapper", args: tuple[Any, ...], output: Any) -> Any:
    return _cast(output, _type_of(module.original_module))
