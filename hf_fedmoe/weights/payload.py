"""What travels between server and client."""

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .layout import StateLayout


@dataclass
class Payload:
    """
    One download or one upload.

    Args:
        row_P (`Tensor` of shape `[P]`): A model's floating-point state as a row of the federation's [`StateLayout`].
        integers (`dict[str, Tensor]`, *optional*): Its integer buffers.
        num_examples (`int`, *optional*, defaults to 0): Training examples of the client.
        metrics (`dict[str, float]`, *optional*): What the client reports (`loss`, `steps`, ...).
        row_bytes (`int`, *optional*): Bytes of the row when it travelled compressed.
    """

    row_P: Tensor
    integers: dict[str, Tensor] = field(default_factory=dict)
    num_examples: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    row_bytes: int | None = None

    def num_bytes(self, layout: StateLayout, shared: Collection[str] | None = None) -> int:
        """
        Bytes on the wire: the encoded row, or the state without the row's padding, and the integers; of the `shared`
        tensors only, if their names are given.
        """
        integers = sum(
            tensor.numel() * tensor.element_size()
            for name, tensor in self.integers.items()
            if shared is None or name in shared
        )
        if self.row_bytes is not None:
            return self.row_bytes + integers
        elements = sum(slot.shape.numel() for slot in layout.slots if shared is None or slot.name in shared)
        return elements * self.row_P.element_size() + integers


def payload_fault(payload: Payload, layout: StateLayout) -> str | None:
    """Why the server must refuse this upload, in words; `None` when it is sound."""
    if payload.row_P.shape != (layout.size,) or payload.row_P.dtype != layout.dtype:
        return (
            f"its weights are a {tuple(payload.row_P.shape)} row of {payload.row_P.dtype}, "
            f"expected ({layout.size},) of {layout.dtype}"
        )
    if payload.num_examples < 1:
        return f"it reports num_examples = {payload.num_examples}"
    # Both pass on a NaN, and unlike a mask of all elements they need no memory of the row's size.
    if not torch.stack(torch.aminmax(payload.row_P)).isfinite().all():
        bad = next(name for name, view in layout.views(payload.row_P).items() if not torch.isfinite(view).all())
        return f"`{bad}` holds values that are not finite"
    return None


def keep_private_(payload: Payload, known: Payload, layout: StateLayout, shared: Collection[str]) -> None:
    """All but the `shared` tensors of an upload get the values that the server has already."""
    before = layout.views(known.row_P)
    for name, view in layout.views(payload.row_P).items():
        if name not in shared:
            view.copy_(before[name])
    payload.integers = {
        name: tensor if name in shared else known.integers[name].clone() for name, tensor in payload.integers.items()
    }
