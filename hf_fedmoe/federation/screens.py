"""
Screens, which look at a round's sound uploads before the method sees them, and shorten or drop some.

What is looked at are updates, a row less what its client was sent, of the tensors that travel.

Shape suffixes: m uploads, P elements of a row, B columns of a block.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from transformers.utils import logging

from ..weights import StateLayout
from ..weights.distances import blocks, kinds_of, norms, squared_distances


logger = logging.get_logger(__name__)


@dataclass
class Updates:
    """
    The updates of a round.

    Args:
        layout ([`StateLayout`]): Of the rows.
        rows (`Sequence[Tensor]`): What came, each `[P]`; a screen may change them in place.
        received (`Sequence[Tensor]`): What each client was sent.
        names (`Collection[str]`): The tensors that travel.
    """

    layout: StateLayout
    rows: Sequence[Tensor]
    received: Sequence[Tensor]
    names: Collection[str]

    def block(self, columns: slice) -> Tensor:
        """Returns the updates in some columns, `[m, B]`."""
        return torch.stack([row_P[columns] - sent_P[columns] for row_P, sent_P in self._pairs()])

    def shorten_(self, place: int, names: Collection[str], factor: float) -> None:
        """Multiplies the named tensors of an update."""
        row_P, sent_P = self.rows[place], self.received[place]
        for columns in blocks(self.layout, names):
            row_P[columns] = sent_P[columns] + (row_P[columns] - sent_P[columns]) * factor

    def _pairs(self) -> zip:
        return zip(self.rows, self.received, strict=True)


@dataclass
class Verdict:
    """
    The finding of a screen.

    Args:
        dropped (`dict[int, str]`, *optional*): Places of uploads that the method is not to see, and why.
        told (`dict[str, float]`, *optional*): Numbers for the log.
    """

    dropped: dict[int, str] = field(default_factory=dict)
    told: dict[str, float] = field(default_factory=dict)


class Screen(Protocol):
    """Looks at the updates of a round; shortens some in place, and names those to drop."""

    def __call__(self, updates: Updates) -> Verdict:
        """Returns what it finds."""


@dataclass
class NormRatio:
    """
    Shortens updates to a multiple of the median of the round's norms: of the parameters, and by itself of the running
    statistics of normalisation layers.

    Args:
        ratio (`float`): At least 1.
    """

    ratio: float

    @torch.no_grad()
    def __call__(self, updates: Updates) -> Verdict:
        shortened = set()
        for names in kinds_of(updates.layout, updates.names):
            norms_m = norms(updates.block, updates.layout, names)
            bound = self.ratio * norms_m.quantile(0.5).item()
            for place, norm in enumerate(norms_m.tolist()):
                if norm > bound:
                    updates.shorten_(place, names, bound / norm)
                    shortened.add(place)
        return Verdict(told={"shortened_updates": float(len(shortened))})


@dataclass
class Krum:
    """
    Keeps the updates that are nearest to others (Blanchard et al. 2017, "Machine Learning with Adversaries"): each is
    scored by the sum of its squared distances to the m - f - 2 nearest others, of m of which f may be hostile.

    Args:
        share (`float`): f / m, of which f is rounded up. With fewer than 2 f + 3 uploads f is as large as they permit.
        many (`bool`, *optional*, defaults to `True`): Whether the m - f of least score are kept (multi-Krum), or the
            one.
    """

    share: float
    many: bool = True

    @torch.no_grad()
    def __call__(self, updates: Updates) -> Verdict:
        m, wanted = len(updates.rows), attackers(self.share, len(updates.rows))
        f = min(wanted, max(0, (m - 3) // 2))
        if f < wanted:
            logger.warning(f"Krum needs more than {m} uploads to leave {wanted} out: it reckons with {f} hostile.")
        kept = m - f if self.many else 1
        scores_m = krum_scores(squared_distances(updates.block, updates.layout, updates.names), f)
        order = scores_m.argsort(stable=True).tolist()
        scores = scores_m.tolist()
        largest = scores[order[kept - 1]]
        return Verdict({place: self._reason(scores[place], largest) for place in sorted(order[kept:])})

    def _reason(self, score: float, largest: float) -> str:
        return (
            f"its update is too far from the others': Krum's score is {score:.3g}, and {largest:.3g} the largest that "
            "was kept"
        )


def attackers(share: float, m: int) -> int:
    """Returns how many of m participants a share is, rounded up."""
    return math.ceil(share * m - 1e-9)


def krum_scores(square_mm: Tensor, f: int) -> Tensor:
    """Returns for each row the sum of the squared distances to its m - f - 2 nearest others, one at least."""
    m = len(square_mm)
    nearest = min(m - 1, max(1, m - f - 2))
    # The nearest of all is the row itself.
    return square_mm.sort(1).values[:, 1 : 1 + nearest].sum(1)
