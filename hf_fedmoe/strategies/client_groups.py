"""
Groups of clients whose classes look alike, as statistics of their data tell them.

Shape suffixes: M, A and B clients or groups of them, K groups, C classes, d features.
"""

import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .client_statistics import ClientStatistics, covariance_factor


# Groups are taken to be two standard deviations apart in each class at least: nearer ones need no model each, and if
# nothing could differ, nothing would be in favour of joining any.
LEAST_SQUARED_DISTANCE = 4.0
# Of so many clients is estimated by how much groups differ: each step compares all pairs.
MOST_COMPARED = 100
MOST_STEPS = 20
# Squared deviations that a client's spread is taken to be the common one by, before its own are counted.
PRIOR_DEVIATIONS = 10.0


@dataclass
class ClassSums:
    """
    Sums over rows of clients, or of groups of them, in features that have covariance 1 within a client's classes.

    Rows of a client that varies more count less, as many of a client that varies as all do on average: pictures of
    one kind may vary twice as much as those of another, and chance takes their means that much further apart.

    Args:
        count_MC (`Tensor` of shape `[M, C]`): Rows of each class, by the share that they count.
        sum_MCd (`Tensor` of shape `[M, C, d]`): The sums of their features.
        size (`float`): Directions in which features vary: d, or fewer where some never do or depend on others.
    """

    count_MC: Tensor
    sum_MCd: Tensor
    size: float

    @classmethod
    def of(cls, clients: Sequence[ClientStatistics]) -> "ClassSums":
        """Returns those of clients, in units of the covariance within classes of all their rows, on the CPU."""
        counts, sums, scatters = (
            torch.stack(each).cpu()
            for each in zip(*((own.count_C, own.sum_Cd, own.scatter()) for own in clients), strict=True)
        )
        together = reduce(operator.add, clients)
        return cls.whitened(counts, sums, scatters, together.within_covariance().cpu())

    @classmethod
    def whitened(cls, count_MC: Tensor, sum_MCd: Tensor, scatter_Mdd: Tensor, covariance_dd: Tensor) -> "ClassSums":
        """
        Returns the sums of features that had a covariance.

        Args:
            count_MC (`Tensor` of shape `[M, C]`): Rows of each class at each client.
            sum_MCd (`Tensor` of shape `[M, C, d]`): The sums of their features.
            scatter_Mdd (`Tensor` of shape `[M, d, d]`): [`ClientStatistics.scatter`] of each client.
            covariance_dd (`Tensor` of shape `[d, d]`): The covariance of features within classes of all rows.
        """
        rows_Nd, factor_dd = sum_MCd.flatten(0, 1), covariance_factor(covariance_dd)
        white_MCd = torch.linalg.solve_triangular(factor_dd, rows_Nd.T, upper=False).T.view_as(sum_MCd)
        inverse_dd = torch.cholesky_inverse(factor_dd)
        size = (covariance_dd * inverse_dd).sum().item()
        squares_M = torch.einsum("mde,de->m", scatter_Mdd.to(factor_dd), inverse_dd)
        free_M = count_MC.sum(1) - (count_MC > 0).sum(1)  # each mean takes a row
        spread_M = (PRIOR_DEVIATIONS + squares_M) / (PRIOR_DEVIATIONS + size * free_M)
        return cls(count_MC / spread_M[:, None], white_MCd / spread_M[:, None, None], size)

    def __getitem__(self, clients: Tensor | slice) -> "ClassSums":
        return ClassSums(self.count_MC[clients], self.sum_MCd[clients], self.size)

    def of_groups(self, group_M: Tensor) -> "ClassSums":
        """Returns the sums of groups, from the group `[M]` of each client."""
        groups, group_M = group_M.unique(return_inverse=True)
        count_KC, sum_KCd = (
            each.new_zeros(len(groups), *each.shape[1:]).index_add_(0, group_M, each)
            for each in (self.count_MC, self.sum_MCd)
        )
        return ClassSums(count_KC, sum_KCd, self.size)

    def join(self, first: int, second: int) -> None:
        """Adds the sums of `second` to those of `first`."""
        self.count_MC[first] += self.count_MC[second]
        self.sum_MCd[first] += self.sum_MCd[second]

    def distances(self, other: "ClassSums") -> Iterator[tuple[Tensor, Tensor]]:
        """
        Yields for each class what is known of any two `[A, B]`, half the harmonic mean of their rows, and the squared
        distance of their means, times that: `size` on average if they have the same mean, 0 where one has no rows.
        """
        mean_ACd, mean_BCd = (each.sum_MCd / _or_one(each.count_MC)[..., None] for each in (self, other))
        for c, (count_A, count_B) in enumerate(zip(self.count_MC.T, other.count_MC.T, strict=True)):
            known_AB = _known(count_A, count_B)
            yield known_AB, known_AB * torch.cdist(mean_ACd[:, c], mean_BCd[:, c]).square()


def _or_one(count: Tensor) -> Tensor:
    """Returns what can be divided by, where nothing is divided."""
    return count.where(count > 0, 1)


def _known(count_A: Tensor, count_B: Tensor) -> Tensor:
    """Returns half the harmonic mean `[A, B]` of the rows that any two have of a class."""
    return count_A[:, None] * count_B / _or_one(count_A[:, None] + count_B)


def shifts(sums: ClassSums) -> Tensor:
    """
    Returns how far the classes of any two clients are apart `[M, M]`: the mean over classes of the squared distance of
    their means, in units of the covariance within classes, weighted by what is known of a class and without what is
    expected of chance. Around 0 for clients that differ in their proportions of classes only.
    """
    total_MM, known_MM = _apart(sums)
    return total_MM / _or_one(known_MM)  # of a row each half a row is known


def strays(sums: ClassSums) -> Tensor:
    """
    Returns the standard deviation `[M, M]` by which [`shifts`] stray where two clients are alike; 0 where they have no
    class in common.
    """
    count_MC, size = sums.count_MC, sums.size
    classes_MM, all_known_MM = torch.zeros(2, len(count_MC), len(count_MC)).to(count_MC)
    for count_M in count_MC.T:
        known_MM = _known(count_M, count_M)
        classes_MM += known_MM > 0
        all_known_MM += known_MM
    return (2 * size * classes_MM).sqrt() / _or_one(all_known_MM)


def _apart(sums: ClassSums) -> tuple[Tensor, Tensor]:
    """
    Returns the distances `[M, M]` of any two, summed over classes and without what is expected of chance, and what is
    known of them.
    """
    total_MM, all_known_MM = torch.zeros(2, len(sums.count_MC), len(sums.count_MC)).to(sums.sum_MCd)
    for known_MM, distance_MM in sums.distances(sums):
        total_MM += distance_MM - sums.size * (known_MM > 0)
        all_known_MM += known_MM
    return total_MM, all_known_MM


def groups_of(sums: ClassSums, num_groups: int) -> Tensor:
    """
    Returns the group `[M]` of each client: joins two at a time, each time the two of which it is likeliest that they
    are one, and counts their rows as those of one client from then on.

    Args:
        sums ([`ClassSums`]): Of the clients.
        num_groups (`int`): How many groups are left.
    """
    num_clients, variance = len(sums.count_MC), _variance_between(sums)
    sums = ClassSums(sums.count_MC.clone(), sums.sum_MCd.clone(), sums.size)
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


def input_distance(groups: ClassSums) -> float:
    """
    Returns how far the inputs of groups are apart, whatever their labels: the mean over pairs of groups that have a
    class in common of the squared distance of their means, in units of the covariance within classes and without what
    is expected of chance. Around 0 or below where groups see the same inputs, also if these mean something else to
    each, or come in other proportions; 0 where no two have a class in common.

    Of a pair it is the smallest of three distances. That of the means of all rows is 0 where the same inputs have
    other labels, that of the means over classes in equal proportions where only proportions differ. Where both do,
    that is 0 which compares each class with the one whose mean lies nearest, whatever it is called.
    """
    distances = []
    rows_K = groups.count_MC.sum(1)
    mean_Kd = groups.sum_MCd.sum(1) / _or_one(rows_K)[:, None]
    for first, second in itertools.combinations(range(len(rows_K)), 2):
        common_n = (groups.count_MC[[first, second]] > 0).all(0).nonzero()[:, 0]
        if not len(common_n):
            continue
        of_rows = (mean_Kd[first] - mean_Kd[second]).square().sum()
        of_rows -= groups.size * (1 / rows_K[first] + 1 / rows_K[second])
        count_2n, sum_2nd = groups.count_MC[[first, second]][:, common_n], groups.sum_MCd[[first, second]][:, common_n]
        mean_nd, other_mean_nd = sum_2nd / count_2n[..., None]
        away_nn = torch.cdist(mean_nd, other_mean_nd).square().nan_to_num()
        nearest_n = torch.from_numpy(linear_sum_assignment(away_nn.numpy())[1])
        of_classes = [
            _distance_of_classes(count_2n[0], mean_nd, count_2n[1, other_n], other_mean_nd[other_n], groups.size)
            for other_n in (torch.arange(len(common_n)), nearest_n)
        ]
        distances.append(min(of_rows.item(), *of_classes))
    return sum(distances) / max(1, len(distances))


def _distance_of_classes(
    count_n: Tensor, mean_nd: Tensor, other_count_n: Tensor, other_mean_nd: Tensor, size: float
) -> float:
    """
    Returns the squared distance of the means of two groups over n classes of each in equal proportions, without what
    is expected of chance.
    """
    known_n = count_n * other_count_n / (count_n + other_count_n)
    share_n = known_n / known_n.sum()
    apart_d = share_n @ (mean_nd - other_mean_nd)
    return (apart_d.square().sum() - size * (share_n.square() / known_n).sum()).item()


def _variance_between(sums: ClassSums) -> float:
    """
    Estimates by how much the means of two clients of different groups differ in each direction, in variances within
    classes: by expectation maximisation over the pairs, of which each is alike or differs.
    """
    # Not every so manyth one: clients may come in the order of their groups, one of each in turn.
    order_M = torch.randperm(len(sums.count_MC), generator=torch.Generator().manual_seed(0))
    sums = sums[order_M[:MOST_COMPARED].sort().values]
    size = sums.size
    least = LEAST_SQUARED_DISTANCE / size
    total_MM, known_MM = (each_MM.triu(1) for each_MM in _apart(sums))
    is_pair_MM = known_MM > 0
    if not is_pair_MM.any():
        return least
    differs_MM, variance, share = is_pair_MM.to(total_MM), 0.0, 0.5
    for _ in range(MOST_STEPS):
        known = (differs_MM * known_MM).sum()
        before, variance = variance, max(((differs_MM * total_MM).sum() / (size * known)).item(), least)
        if abs(variance - before) < 1e-3 * variance:
            break
        odds = math.log(share / (1 - share))
        differs_MM = (odds - _evidence(sums, sums, variance) / 2).sigmoid() * is_pair_MM
        # Never all or none, from which there would be no way back.
        share = (differs_MM.sum() / is_pair_MM.sum()).clamp(0.01, 0.99).item()
    return variance


def _evidence(ours: ClassSums, theirs: ClassSums, variance: float) -> Tensor:
    """
    Returns twice the log of the Bayes factor `[A, B]` that any two have the same means of classes, against means whose
    difference is normal with `variance` in each direction. It is 0 for two that have no class in common: of them
    nothing is known, and those that are known to be alike come first.
    """
    evidence_AB = torch.zeros(len(ours.count_MC), len(theirs.count_MC)).to(ours.sum_MCd)
    for known_AB, distance_AB in ours.distances(theirs):
        ratio_AB = known_AB * variance
        evidence_AB += ours.size * ratio_AB.log1p() - distance_AB * ratio_AB / (1 + ratio_AB)
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
