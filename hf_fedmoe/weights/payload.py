"""A payload: the named tensors that travel between server and client."""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .layout import StateLayout, in_one_copy


# Beyond it, counting on would lose count.
MOST_BATCHES = 2**53
# What a client reports is weighed, multiplied and added up in float64, where numbers of float32 do not overflow.
MOST_REPORTED = torch.finfo(torch.float32).max


@dataclass
class Payload:
    """
    One download or one upload: a model, and named tensors beside it.

    Args:
        row_P (`Tensor` of shape `[P]`): A model's floating-point state as a row of the federation's [`StateLayout`].
        integers (`dict[str, Tensor]`, *optional*): Its integer buffers.
        num_examples (`int`, *optional*, defaults to 0): Training examples of the client.
        metrics (`dict[str, float]`, *optional*): What the client reports (`loss`, `steps`, ...).
        tensors (`dict[str, Tensor]`, *optional*): What travels beside the model.
        sizes (`dict[str, int]`, *optional*): Bytes on the wire of each tensor of the model, see [`Payload.weigh`].
        encoded (`dict[str, Tensor]`, *optional*): What travels in the place of the tensors that a codec has encoded.
    """

    row_P: Tensor
    integers: dict[str, Tensor] = field(default_factory=dict)
    num_examples: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    encoded: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes on the wire."""
        return sum(self.sizes.values()) + sum(tensor.nbytes for tensor in self.tensors.values())

    def weigh(self, layout: StateLayout, shared: Collection[str] | None = None) -> None:
        """
        Sets the `sizes` of a model that travels as it is: those of the state, without the row's padding, and of
        integers, or of the `shared` tensors only, if their names are given.
        """
        sizes = layout.sizes | {name: tensor.nbytes for name, tensor in self.integers.items()}
        self.sizes = {name: size for name, size in sizes.items() if shared is None or name in shared}


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Tells whether nothing in tensors is infinite or NaN: in one pass over each, without masks of their sizes."""
    found: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            extremes = torch.stack(torch.aminmax(tensor.detach()))  # both pass on a NaN
            found.setdefault(tensor.device, []).append(extremes.isfinite().all())
    return all(torch.stack(of_device).all() for of_device in found.values())


def negative_variance(rows_SP: Tensor, layout: StateLayout) -> str | None:
    """Says which running variance of some rows is the least, and its value, `None` if none is below 0."""
    variances = [variance for _, variance in layout.batchnorm]
    if not variances or torch.cat([rows_SP[:, v.start : v.stop] for v in variances], 1).min() >= 0:
        return None
    least = [rows_SP[:, v.start : v.stop].min().item() for v in variances]
    return f"`{variances[least.index(min(least))].name}` holds {min(least):.3g}, and no variance is below 0"


def payload_fault(payload: Payload, layout: StateLayout, known: Payload) -> str | None:
    """
    Says why the server must refuse an upload, `None` when it is sound. Refused is what no training can give, whoever
    sent it, and what nothing can be computed with.

    Args:
        payload ([`Payload`]): The upload.
        layout ([`StateLayout`]): Of the federation's rows.
        known ([`Payload`]): The server's integer buffers, and the examples that the client is registered with.
    """
    if payload.row_P.shape != (layout.size,) or payload.row_P.dtype != layout.dtype:
        return (
            f"its weights are a {tuple(payload.row_P.shape)} row of {payload.row_P.dtype}, "
            f"expected ({layout.size},) of {layout.dtype}"
        )
    if not 1 <= payload.num_examples <= known.num_examples:  # a NaN is neither
        return f"it reports num_examples = {payload.num_examples}, and is registered with {known.num_examples}"
    for name, value in payload.metrics.items():
        if not abs(value) <= MOST_REPORTED:  # a NaN is not either
            return f"it reports {name} = {value}"
    for name, tensor in payload.tensors.items():
        if not all_finite([tensor]):
            return f"`{name}`, which it sends beside the model, holds values that are not finite"
        if tensor.is_floating_point() and tensor.numel():
            largest, bound = tensor.abs().max().item(), math.sqrt(torch.finfo(tensor.dtype).max / tensor.numel())
            if largest > bound:
                return f"`{name}` holds {largest:.3g}, too much to compute with: above {bound:.3g} squares overflow"
    return _fault_of_integers(payload.integers, known.integers) or _fault_of_weights(payload.row_P, layout)


def _fault_of_integers(integers: dict[str, Tensor], known: dict[str, Tensor]) -> str | None:
    for name in integers:
        found, expected = (
            f"{tuple(state[name].shape)} of {state[name].dtype}" if name in state else "nothing"
            for state in (integers, known)
        )
        if found != expected:
            return f"it sends {found} as `{name}`, expected {expected}"
    counts = {name: t for name, t in integers.items() if name.endswith("num_batches_tracked")}
    for name, count in in_one_copy(counts, "cpu").items():
        if not 0 <= count.item() < MOST_BATCHES:
            return f"`{name}` is {count.item()}, which is no count of batches"
    return None


def _fault_of_weights(row_P: Tensor, layout: StateLayout) -> str | None:
    # Fusing running statistics, clipping and distances square the weights. Whatever has been trained is far below.
    bound = math.sqrt(torch.finfo(layout.dtype).max / layout.num_elements)
    largest = torch.stack(torch.aminmax(row_P)).abs().max().item()
    if not largest <= bound:  # of a NaN too
        for name, view in layout.views(row_P).items():
            if not all_finite([view]):
                return f"`{name}` holds values that are not finite"
            if view.numel() and view.abs().max() == largest:
                return f"`{name}` holds {largest:.3g}, too much to compute with: above {bound:.3g} squares overflow"
        return f"its padding holds {largest:.3g}"
    return negative_variance(row_P[None], layout)


def keep_private_(payload: Payload, known: Payload, layout: StateLayout, shared: Collection[str]) -> None:
    """All but the `shared` tensors of the model in an upload get the values that the server has already."""
    before = layout.views(known.row_P)
    for name, view in layout.views(payload.row_P).items():
        if name not in shared:
            view.copy_(before[name])
    payload.integers = {
        name: tensor if name in shared else known.integers[name].clone() for name, tensor in payload.integers.items()
    }
