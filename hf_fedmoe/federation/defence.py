"""Defences against hostile uploads: screens that uploads pass, and the reducer that fuses them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from ..weights import Reducer, by_entries, fuse_geometric_median_, fuse_models_, median, trimmed_mean
from .screens import Krum, NormRatio, Screen


@dataclass(frozen=True)
class Defence:
    """
    Stands between the uploads of a round and its method.

    Args:
        screens (`Sequence[Screen]`, *optional*): They look at all uploads together, one after another.
        fuse_ ([`~weights.Reducer`], *optional*): Fuses them, by the mean if left out.
        by_entries (`bool`, *optional*, defaults to `False`): Whether that takes each entry of rows by itself.
    """

    screens: Sequence[Screen] = ()
    fuse_: Reducer = fuse_models_
    by_entries: bool = False


UNDEFENDED = Defence()


def _median(share: float) -> Defence:
    return Defence(fuse_=by_entries(median), by_entries=True)


def _trimmed_mean(share: float) -> Defence:
    return Defence(fuse_=by_entries(trimmed_mean(share)), by_entries=True)


def _geometric_median(share: float) -> Defence:
    return Defence(fuse_=fuse_geometric_median_)


def _krum(share: float, many: bool) -> Defence:
    return Defence([Krum(share, many)])


# By their names in `robust_fusion`: from the share of participants that may be hostile to the defence.
ROBUST_FUSIONS: dict[str, Callable[[float], Defence]] = {
    "median": _median,
    "trimmed_mean": _trimmed_mean,
    "geometric_median": _geometric_median,
    "krum": partial(_krum, many=False),
    "multi_krum": partial(_krum, many=True),
}


def make_defence(
    robust_fusion: str | None = None, expected_attackers: float = 0.0, max_update_norm_ratio: float | None = None
) -> Defence:
    """
    Returns the defence of a run.

    Args:
        robust_fusion (`str`, *optional*): A name in `ROBUST_FUSIONS`; the mean if left out.
        expected_attackers (`float`, *optional*, defaults to 0): Share of a round's participants that may be hostile.
        max_update_norm_ratio (`float`, *optional*): To what multiple of the median updates are shortened first.
    """
    chosen = ROBUST_FUSIONS[robust_fusion](expected_attackers) if robust_fusion else UNDEFENDED
    first: list[Screen] = [] if max_update_norm_ratio is None else [NormRatio(max_update_norm_ratio)]
    return Defence([*first, *chosen.screens], chosen.fuse_, chosen.by_entries)
