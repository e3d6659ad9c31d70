"""
Reducers, which fuse rows by another location than their mean: one that a few hostile rows cannot move far.

Each has the arguments and the result of [`fuse_models_`], bank <- keep * bank + rate * location(uploads), where `rate`
is the sum of a row's weights and the location is that of the uploads with these weights, each expert's with its own.
The mean is `fuse_models_` itself.

Median and trimmed mean take each entry by itself. A running variance is fused as of a mixture: the location of the
variances, and that of the squared distances of the means from the fused mean; of the mean this is the rule of
[`fuse_`]. The geometric median is a mean with other weights, so that it holds for LoRA's products too.

Shape suffixes: S rows of the server's bank, m uploads, P elements of a row, B columns of a block, F features of a
normalisation layer.
"""

from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

from .distances import COLUMNS, squared_distances
from .layout import StateLayout
from .lora_rows import fuse_models_


# From the bank, uploads, weights, keep and layout to what [`fuse_models_`] returns.
Reducer = Callable[[Tensor, Tensor, Tensor, Tensor, StateLayout], Tensor]
# From values `[m, B]` in ascending order, with the shares `[m, B]` that they have of 1, to their location `[B]`.
Rule = Callable[[Tensor, Tensor], Tensor]

# Shares are rounded sums; a half is a half if it is one but for that.
_ROUNDING = 1e-6
# Of Weiszfeld's steps: as many at most, until no weight moves by more than that.
_STEPS, _STILL = 200, 1e-10
# In radii of the ball that holds half of the weight: no distance is less, and what is farther away has no weight.
_LEAST, _FARTHEST = 1e-6, 1e6


def median(sorted_mB: Tensor, share_mB: Tensor) -> Tensor:
    """Returns the weighted median: below it and above it is half of the weight; the middle of two such values."""
    passed_mB = _passed(share_mB)
    ends = ((passed_mB < 0.5 + side).sum(0).clamp_max(len(sorted_mB) - 1) for side in (-_ROUNDING, _ROUNDING))
    lower_B, upper_B = (sorted_mB.gather(0, index_B[None])[0] for index_B in ends)
    return (lower_B + upper_B) / 2


def trimmed_mean(trim: float) -> Rule:
    """
    Returns the rule that leaves out a share `trim` of the weight at either end (Yin et al. 2018, "Byzantine-Robust
    Distributed Learning"), in part the values at which the share ends. `trim` = 0 is the mean.
    """

    def rule(sorted_mB: Tensor, share_mB: Tensor) -> Tensor:
        passed_mB = _passed(share_mB)
        kept_mB = (passed_mB.clamp_max(1 - trim) - (passed_mB - share_mB).clamp_min(trim)).clamp_min(0)
        return (kept_mB * sorted_mB).sum(0) / kept_mB.sum(0)

    return rule


def _passed(share_mB: Tensor) -> Tensor:
    """Returns sums of shares up to each: row by row, as a GPU refuses `cumsum` with `full_determinism`."""
    return torch.stack(list(accumulate(share_mB)))


def by_entries(rule: Rule) -> Reducer:
    """Returns the reducer that takes each entry of rows by itself."""

    @torch.no_grad()
    def fuse(bank_SP: Tensor, uploads_mP: Tensor, weights_Sm: Tensor, keep_S: Tensor, layout: StateLayout) -> Tensor:
        rate_S = weights_Sm.sum(1)
        share_Sm = _shares(weights_Sm)
        located_SP = torch.zeros_like(bank_SP)
        for start in range(0, bank_SP.shape[1], COLUMNS):
            columns = slice(start, start + COLUMNS)
            located_SP[:, columns] = _locate(uploads_mP[:, columns].double(), share_Sm, rule)
        for mean, variance in layout.batchnorm:
            means_mF = uploads_mP[:, mean.start : mean.stop].double()
            for located_P, share_m in zip(located_SP, share_Sm, strict=True):
                apart_mF = (means_mF - located_P[mean.start : mean.stop]).square()
                located_P[variance.start : variance.stop] += _locate(apart_mF, share_m[None], rule)[0]
        return fuse_models_(bank_SP, located_SP, rate_S.diag(), keep_S, layout)

    return fuse


def _locate(rows_mB: Tensor, share_Sm: Tensor, rule: Rule) -> Tensor:
    sorted_mB, order_mB = rows_mB.sort(0)
    return torch.stack([rule(sorted_mB, share_m[order_mB]) for share_m in share_Sm])


def _shares(weights_Sm: Tensor) -> Tensor:
    """Returns weights that sum to 1; equal ones where nobody weighs anything, for a location that is not used."""
    weights_Sm = weights_Sm.double()
    total_S1 = weights_Sm.sum(1, keepdim=True)
    return torch.where(total_S1 > 0, weights_Sm / total_S1, 1 / weights_Sm.shape[1])


@torch.no_grad()
def fuse_geometric_median_(
    bank_SP: Tensor, uploads_mP: Tensor, weights_Sm: Tensor, keep_S: Tensor, layout: StateLayout
) -> Tensor:
    """Fuses by the geometric median, with the least weighted sum of distances (RFA, Pillutla et al. 2022)."""
    # On the host: each of many steps asks whether it was the last.
    square_mm = squared_distances(lambda columns: uploads_mP[:, columns], layout).cpu()
    rate_S1 = weights_Sm.sum(1, keepdim=True)
    share_Sm = torch.stack([weiszfeld(share_m, square_mm) for share_m in _shares(weights_Sm).to(square_mm)])
    return fuse_models_(bank_SP, uploads_mP, rate_S1 * share_Sm.to(weights_Sm), keep_S, layout)


def weiszfeld(share_m: Tensor, square_mm: Tensor) -> Tensor:
    """
    Returns the weights `[m]` of the mean that is the geometric median, by smoothed Weiszfeld steps (Pillutla et al.
    2022, Algorithm 2): each row has its share over its distance from the last mean.

    All lengths are in units of the smallest ball around a row that holds half of the weight, which rows that are far
    away, with less than half of it, cannot make any larger. The steps begin at the mean of the ball.

    Args:
        share_m (`Tensor` of shape `[m]`): The rows' own weights, in float64, which sum to 1.
        square_mm (`Tensor` of shape `[m, m]`): Squared distances between the rows, in float64.
    """
    radius_m = _radii_of_half(share_m, square_mm)
    center = radius_m.argmin()
    radius, distance_m = radius_m[center], square_mm[center].sqrt()
    share_m = share_m * (distance_m <= _FARTHEST * radius)
    weight_m = share_m * (distance_m <= radius)
    weight_m = weight_m / weight_m.sum()
    least = max(_LEAST * radius.item(), 1e-30)
    for _ in range(_STEPS):
        before_m, away_m = weight_m, square_mm @ weight_m
        distance_m = (away_m - weight_m @ away_m / 2).clamp_min(0).sqrt()
        weight_m = share_m / distance_m.clamp_min(least)
        weight_m = weight_m / weight_m.sum()
        if (weight_m - before_m).abs().max() <= _STILL:
            break
    return weight_m


def _radii_of_half(share_m: Tensor, square_mm: Tensor) -> Tensor:
    """Returns for each row the least radius `[m]` of a ball around it that holds half of the weight."""
    near_mm, order_mm = square_mm.sort(1)
    passed_mm = share_m[order_mm].cumsum(1)
    place_m1 = (passed_mm < 0.5 - _ROUNDING).sum(1, keepdim=True).clamp_max(len(share_m) - 1)
    return near_mm.gather(1, place_m1)[:, 0].sqrt()
