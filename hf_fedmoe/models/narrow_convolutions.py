"""A fault of the CPU library in the backward of narrow convolutions, and the way around it."""

from typing import Any, TypeVar

from torch import Tensor, nn


Module = TypeVar("Module", bound=nn.Module)

# Channels from which on the workspace is large enough: the numbers in a register of AVX-512. With AVX2 it is 8.
WIDE_ENOUGH = 16


def guard_narrow_convolutions(model: Module) -> Module:
    """
    Keeps the backward of 1x1 convolutions with a stride and few channels within its memory; changes the module in
    place, and nothing that it computes.

    oneDNN, in PyTorch 2.13, copies what such a convolution reads of a map with channels last to a workspace: whole
    registers, to a place as large as the channels. What lies behind is overwritten, so that gradients differ from run
    to run or the process aborts (https://github.com/uxlfoundation/oneDNN/issues/6035). It does so only where the
    strides divide the map; rows and columns at its end are then never read, and are left out here. Unlike other
    orders in memory this also holds for weights with channels last, and under `torch.compile`.

    [`~training.FederatedTrainer`] guards its model and [`~federation.LocalTrainer`] the models of other architectures.
    A plain `Trainer` with [`~data.ImageCollator`], whose batches have channels last, needs it too.

    Args:
        model (`torch.nn.Module`): Also one without such convolutions, and one that is guarded already.

    Returns:
        `torch.nn.Module`: `model`.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and _is_at_risk(module):
            # Of a module that is guarded already the rest is nothing.
            module.register_forward_pre_hook(_leave_out_unread, with_kwargs=True)
    return model


def _is_at_risk(convolution: nn.Conv2d) -> bool:
    return (
        convolution.kernel_size == (1, 1)
        and convolution.padding in ((0, 0), "valid")
        and max(convolution.stride) > 1
        and convolution.in_channels // convolution.groups < WIDE_ENOUGH
    )


def _leave_out_unread(
    convolution: nn.Conv2d, inputs: tuple[Tensor, ...], named: dict[str, Any]
) -> tuple[tuple[Tensor], dict[str, Any]]:
    maps = inputs[0] if inputs else named["input"]
    rows, columns = (
        (size - 1) // stride * stride + 1 for size, stride in zip(maps.shape[-2:], convolution.stride, strict=True)
    )
    return (maps[..., :rows, :columns],), {}
