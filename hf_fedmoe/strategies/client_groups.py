"""
Groups of clients whose classes look alike, as statistics of their data tell them.

Shape suffixes: M, A and B clients or groups of them, K groups, C classes, d features.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .client_statistics import covariance_factor


# Means of a class are never taken to be the same in all groups, or nothing would be in favour of joining any.
LEAST_VARIANCE = 1e-3


@dataclass
class ClassSums:
    """
    Sums over rows of clients, or of groups of them, in features that have covariance 1 within classes.

    Args:
        count_MC (`Tensor` of shape `[M, C]`): Rows of each class.
        sum_MCd (`Tensor` of shape `[M, C, d]`): The sums of their features.
    """

    count_MC: Tensor
    sum_MCd: Tensor

    @classmethod
    def whitened(cls, count_MC: Tensor, sum_MCd: Tensor, covariance_dd: Tensor) -> "ClassSums":
        """Returns the sums of features that had such a covariance."""
        rows_Nd, factor_dd = sum_MCd.flatten(0, 1), covariance_factor(covariance_dd)
        return cls(count_MC, torch.linalg.solve_triangular(factor_dd, rows_Nd.T, upper=False).T.view_as(sum_MCd))

    def __getitem__(self, clients: slice) -> "ClassSums":
        return ClassSums(self.count_MC[clients], self.sum_MCd[clients])

    def join(self, first: int, second: int) -> None:
        """Adds the sums of `second` to those of `first`."""
        self.count_MC[first] += self.count_MC[second]
        self.sum_MCd[first] += self.sum_MCd[second]

    def distances(self, other: "ClassSums") -> Iterator[tuple[Tensor, Tensor]]:
        """
        Yields for each class what is known of any two `[A, B]`, half the harmonic mean of their rows, and the squared
        distance of their means, times that: d on average if they have the same mean, 0 where one has no rows.
        """
        mean_ACd, mean_BCd = (each.sum_MCd / each.count_MC.clamp_min(1)[..., None] for each in (self, other))
        for c, (count_A, count_B) in enumerate(zip(self.count_MC.T, other.count_MC.T, strict=True)):
            known_AB = count_A[:, None] * count_B / (count_A[:, None] + count_B).clamp_min(1)
            yield known_AB, known_AB * torch.cdist(mean_ACd[:, c], mean_BCd[:, c]).square()


def shifts(count_MC: Tensor, sum_MCd: Tensor, covariance_dd: Tensor) -> Tensor:
    """
    Returns how far the classes of any two clients are apart `[M, M]`: the mean over classes of the squared distance of
    their means, in units of the covariance within classes, weighted by what is known of a class and without what is
    expected of chance. Around 0 for clients that differ in their proportions of classes only.
    """
    total_MM, known_MM = _apart(ClassSums.whitened(count_MC, sum_MCd, covariance_dd))
    return total_MM / known_MM.where(known_MM > 0, 1)  # of a row each half a row is known


def strays(count_MC: Tensor, size: int) -> Tensor:
    """
    Returns the standard deviation `[M, M]` by which [`shifts`] of `size` features stray where two clients are alike; 0
    where they have no class in common.
    """
    classes_MM, all_known_MM = torch.zeros(2, len(count_MC), len(count_MC)).to(count_MC)
    for count_M in count_MC.T:
        known_MM = count_M[:, None] * count_M / (count_M[:, None] + count_M).clamp_min(1)
        classes_MM += known_MM > 0
        all_known_MM += known_MM
    return (2 * size * classes_MM).sqrt() / all_known_MM.where(all_known_MM > 0, 1)


def _apart(sums: ClassSums) -> tuple[Tensor, Tensor]:
    """
    Returns the distances `[M, M]` of any two, summed over classes and without what is expected of chance, and what is
    known of them.
    """
    total_MM, all_known_MM = torch.zeros(2, len(sums.count_MC), len(sums.count_MC)).to(sums.sum_MCd)
    for known_MM, distance_MM in sums.distances(sums):
        total_MM += distance_MM - sums.sum_MCd.shape[2] * (known_MM > 0)
        all_known_MM += known_MM
    return total_MM, all_known_MM


def groups_of(count_MC: Tensor, sum_MCd: Tensor, covariance_dd: Tensor, num_groups: int) -> Tensor:
    """
    Returns the group `[M]` of each client: joins two at a time, each time the two of which it is likeliest that they
    are one, and counts their rows as those of one client from then on.

    Args:
        count_MC (`Tensor` of shape `[M, C]`): Rows of each class at each client.
        sum_MCd (`Tensor` of shape `[M, C, d]`): The sums of their features.
        covariance_dd (`Tensor` of shape `[d, d]`): The covariance of features within classes.
        num_groups (`int`): How many groups are left.
    """
    sums, num_clients = ClassSums.whitened(count_MC.clone(), sum_MCd, covariance_dd), len(count_MC)
    variance = _variance_between(sums)
    evidence_MM = _evidence(sums, sums, variance).fill_diagonal_(-torch.inf)
    group_M = torch.arange(num_clients)
    for _ in range(num_clients - num_groups):
        first, second = divmod(int(evidence_MM.argmax()), num_clients)
        sums.join(first, second)
        group_M[group_M == second] = first
        evidence_M = _evidence(sums[first : first + 1], sums, variance)[0].to(evidence_MM)
        # Who was joined to another is a group no more, and nobody is joined to itself.
        evidence_M[evidence_MM[first] == -torch.inf] = -torch.inf
        evidence_M[second] = -torch.inf
        evidence_MM[first] = evidence_MM[:, first] = evidence_M
        evidence_MM[second] = evidence_MM[:, second] = -torch.inf
    return group_M.unique(return_inverse=True)[1]


def _variance_between(sums: ClassSums) -> float:
    """Estimates by how much the means of two clients differ in each direction, in variances within classes."""
    # A client is as far from itself as chance never lets two be.
    others_MM = ~torch.eye(len(sums.count_MC), dtype=torch.bool)
    total, known = (each_MM.cpu()[others_MM].sum() for each_MM in _apart(sums))
    return max((total / (sums.sum_MCd.shape[2] * known).clamp_min(1)).item(), LEAST_VARIANCE)


def _evidence(ours: ClassSums, theirs: ClassSums, variance: float) -> Tensor:
    """
    Returns twice the log of the Bayes factor `[A, B]` that any two have the same means of classes, against means whose
    difference is normal with `variance` in each direction. It is 0 for two that have no class in common: of them
    nothing is known, and those that are known to be alike come first.
    """
    size = ours.sum_MCd.shape[2]
    evidence_AB = torch.zeros(len(ours.count_MC), len(theirs.count_MC)).to(ours.sum_MCd)
    for known_AB, distance_AB in ours.distances(theirs):
        ratio_AB = known_AB * variance
        evidence_AB += size * ratio_AB.log1p() - distance_AB * ratio_AB / (1 + ratio_AB)
    return evidence_AB


def with_old_names(group_M: Tensor, old_M: Tensor, num_groups: int) -> Tensor:
    """
    Returns groups `[M]` numbered so that as many clients as can be keep the number that they had in `old_M`, where -1
    is none.
    """
    had_M = old_M >= 0
    overlap_KK = torch.zeros(num_groups, num_groups)
    overlap_KK.index_put_((group_M[had_M], old_M[had_M]), torch.ones(int(had_M.sum())), accumulate=True)
    groups, names = linear_sum_assignment(overlap_KK.numpy(), maximize=True)
    name_K = torch.empty(num_groups, dtype=torch.int64)
    name_K[torch.from_numpy(groups)] = torch.from_numpy(names)
    return name_K[group_M]
