"""
Lengths of rows and distances between them, in float64, some columns at a time.

Parameters and the running statistics of normalisation layers are measured apart: statistics may be a thousand times as
large, and either kind would hide in the length of the other.

Shape suffixes: m rows, P elements of a row, B columns of a block.
"""

from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor

from .layout import StateLayout


# Columns that are converted at a time.
COLUMNS = 16_384

# From columns of rows to their values, `[m, B]`.
Block = Callable[[slice], Tensor]


def kinds_of(layout: StateLayout, names: Collection[str] | None = None) -> list[set[str]]:
    """Returns the names of a row's parameters, and those of its running statistics if it has any; of `names` only."""
    every = {slot.name for slot in layout.slots if names is None or slot.name in names}
    return [kind for kind in (every - layout.statistics, every & layout.statistics) if kind]


def blocks(layout: StateLayout, names: Collection[str]) -> Iterator[slice]:
    """Gives the columns of named tensors, some at a time."""
    for slot in layout.slots:
        if slot.name in names:
            for start in range(slot.start, slot.stop, COLUMNS):
                yield slice(start, min(start + COLUMNS, slot.stop))


@torch.no_grad()
def norms(block: Block, layout: StateLayout, names: Collection[str]) -> Tensor:
    """Returns the norms `[m]` of the named tensors of rows."""
    squares_m = sum((block(columns).double().square().sum(1) for columns in blocks(layout, names)), torch.zeros(()))
    return squares_m.sqrt()


@torch.no_grad()
def squared_distances(block: Block, layout: StateLayout, names: Collection[str] | None = None) -> Tensor:
    """
    Returns the squared distances `[m, m]` between rows. Where rows have running statistics, these count as much as the
    parameters: each kind in units of what is usual between two rows.

    Args:
        block (`Callable`): Gives values of the rows.
        layout ([`StateLayout`]): Of the rows.
        names (`Collection[str]`, *optional*): The tensors that count; all if left out.
    """
    found = [_squared_distances(block, layout, kind) for kind in kinds_of(layout, names)]
    if not found:  # nothing travels
        m = len(block(slice(0, 0)))
        return torch.zeros(m, m, dtype=torch.float64)
    if len(found) == 1:
        return found[0]
    return torch.stack([square_mm / _typical(square_mm) for square_mm in found]).sum(0)


def _squared_distances(block: Block, layout: StateLayout, names: Collection[str]) -> Tensor:
    products_mm = torch.zeros(())
    for columns in blocks(layout, names):
        rows_mB = block(columns).double()
        # What most have in common would only cost digits; with a row that is far from all in its place there were none
        # left of the distances between the others.
        rows_mB = rows_mB - _median(rows_mB)
        products_mm = products_mm + rows_mB @ rows_mB.T
    square_m = products_mm.diagonal()
    square_mm = (square_m[:, None] + square_m - 2 * products_mm).clamp_min(0)
    return square_mm.fill_diagonal_(0)


def _median(rows_mB: Tensor) -> Tensor:
    if rows_mB.is_cuda and torch.are_deterministic_algorithms_enabled():  # where a GPU refuses; slower
        return rows_mB.sort(0).values[(len(rows_mB) - 1) // 2]
    return rows_mB.median(0).values


def _typical(square_mm: Tensor) -> Tensor:
    """
    Returns the median of the distances from that row whose median is the least: fewer than half of the rows, however
    far, do not change what it is like. Where most rows are equal it is next to nothing.
    """
    m = len(square_mm)
    if m == 1:
        return square_mm.new_ones(())
    typical = square_mm.sort(1).values[:, 1 + (m - 2) // 2].min()  # the nearest of all is the row itself
    return torch.where(typical > 0, typical, 1e-9 * square_mm.max()).clamp_min(torch.finfo(square_mm.dtype).tiny)
