"""Groups of clients by what their classes look like: shifts, and who is joined with whom."""

import copy

import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from torch.distributions import Normal

from hf_fedmoe.strategies.client_groups import (
    ClassSums,
    _evidence,
    _variance_between,
    groups_of,
    input_distance,
    shifts,
    strays,
    with_old_names,
)
from hf_fedmoe.strategies.client_statistics import ClientStatistics
from tests.clients_of_groups import D, SCALES_d, clients_of_groups, in_common, means_of_groups


EVERY = [0, 1, 2]


def test_shifts_are_those_of_the_means_in_units_of_the_spread():
    """Estimates without a bias, where the covariance is known."""
    means_gCd = means_of_groups(3, 0.4)
    clients = clients_of_groups([0, 1, 2] * 4, means_gCd, [EVERY] * 12)
    counts, sums = (torch.stack([getattr(client, name) for client in clients]) for name in ("count_C", "sum_Cd"))
    scatters = torch.stack([client.scatter() for client in clients])
    shift_MM = shifts(ClassSums.whitened(counts, sums, scatters, SCALES_d.double().square().diag()))
    for g in range(3):
        for other in range(3):
            pairs = [(c, o) for c in range(g, 12, 3) for o in range(other, 12, 3) if c != o]
            found = torch.stack([shift_MM[pair] for pair in pairs]).mean().item()
            true = (means_gCd[g] - means_gCd[other]).square().sum(1).mean().item()
            assert found == pytest.approx(true, abs=0.05 + 0.1 * true)


def test_a_row_each_tells_the_whole_distance():
    """A difference of 4 with variance 1 + 1 has the square 16, of which 2 are expected of chance."""
    one_each = torch.ones(2, 1).double(), torch.tensor([[[0.0]], [[4.0]]]).double(), torch.zeros(2, 1, 1).double()
    white = ClassSums.whitened(*one_each, torch.eye(1).double())
    assert shifts(white)[0, 1].item() == pytest.approx(14, rel=2e-3)  # a thousandth is added to variances


def test_shifts_of_clients_who_are_alike_stray_by_chance_as_far_as_is_told():
    """Compares with draws; of clients 2 and 3, who have no class in common, nothing strays."""
    counts = torch.tensor([[50.0, 0.0], [20.0, 30.0], [10.0, 0.0], [0.0, 10.0]]).double()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2000, *counts.shape, D, generator=generator).double() * counts.sqrt()[..., None]
    drawn = torch.stack([shifts(ClassSums(counts, each, D)) for each in noise])
    told = strays(ClassSums(counts, noise[0], D))
    assert told[2, 3] == 0 and (drawn[:, 2, 3] == 0).all()
    for pair in ((0, 1), (0, 2), (1, 2), (1, 3)):
        assert drawn[:, *pair].std().item() == pytest.approx(told[pair].item(), rel=0.08)
        assert drawn[:, *pair].mean().item() == pytest.approx(0, abs=0.1 * told[pair].item())


def test_proportions_of_classes_make_no_shift():
    skewed = [[0, 1], [0, 1], [0, 1, 1, 1, 1], [0, 1, 1, 1, 1]]
    alike = in_common(clients_of_groups([0] * 4, means_of_groups(1, 1.0), skewed))
    assert shifts(alike).fill_diagonal_(0).abs().max() < 0.2
    apart = in_common(clients_of_groups([0, 1] * 2, means_of_groups(2, 1.0), [[0, 1]] * 4))
    assert shifts(apart)[0, 1] > 2


def distance_and_shift(means_gCd, classes):
    """Returns how far the inputs and the classes of two groups of four clients are apart, whose spread is known."""
    clients = clients_of_groups([0, 1] * 4, means_gCd, classes, rows=1000)
    variances = SCALES_d.double().square().diag()
    counts, sums = (torch.stack([getattr(client, name) for client in clients]) for name in ("count_C", "sum_Cd"))
    scatters = torch.stack([client.scatter() for client in clients])
    white = ClassSums.whitened(counts, sums, scatters, variances)
    groups = white.of_groups(torch.tensor([0, 1] * 4))
    return input_distance(groups), shifts(groups)[0, 1].item()


def test_inputs_of_groups_are_apart_by_what_is_not_in_their_labels():
    """Labels that mean something else leave inputs as they are, other proportions leave classes as they are."""
    means_1Cd = means_of_groups(1, 2.0)
    moved_gCd = torch.cat([means_1Cd, means_1Cd.roll(1, 1)])
    distance, shift = distance_and_shift(moved_gCd, [EVERY] * 8)
    assert distance == pytest.approx(0, abs=0.05) and shift > 10
    distance, shift = distance_and_shift(means_1Cd.expand(2, -1, -1), [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]] * 4)
    assert distance == pytest.approx(0, abs=0.05) and shift == pytest.approx(0, abs=0.05)
    # Each class is moved by as much: in whatever proportions they come, inputs are that far apart.
    away_d = torch.tensor([0.3, -0.2, 0.0, 0.4, 0.1])
    distance, shift = distance_and_shift(torch.cat([means_1Cd, means_1Cd + away_d]), [EVERY] * 8)
    assert distance == pytest.approx(away_d.square().sum().item(), abs=0.08) and shift == pytest.approx(0.3, abs=0.05)
    assert distance_and_shift(moved_gCd, [[0], [1]] * 4)[0] == 0  # no class in common


@pytest.mark.parametrize(
    ("first", "second"),
    [([0, 0, 0, 0, 1, 2], [0, 0, 0, 0, 1, 2]), ([0, 1, 1, 2], [0, 0, 1, 2]), ([0, 1, 1, 1], [0, 1, 1, 1])],
)
def test_inputs_are_alike_where_labels_mean_something_else_and_classes_come_in_other_proportions(first, second):
    """Finds the class whose inputs are alike, whatever its label: neither kind of mean by itself is the same."""
    means_1Cd, own = means_of_groups(1, 2.0), sorted({*first})
    moved_1Cd = means_1Cd.clone()
    moved_1Cd[:, own] = means_1Cd[:, own[1:] + own[:1]]
    classes = [first, second] * 4
    assert distance_and_shift(torch.cat([means_1Cd, moved_1Cd]), classes)[0] == pytest.approx(0, abs=0.02)
    # What no label explains is seen all the same, though one of the other two may be smaller by coincidence.
    away_d = torch.tensor([0.6, -0.4, 0.0, 0.8, 0.2])
    apart_gCd = torch.cat([means_1Cd, moved_1Cd + away_d])
    assert 0.6 < distance_and_shift(apart_gCd, classes)[0] < 1.3


def test_distances_of_inputs_by_hand():
    """In one direction: the smallest of a pair, less what is expected of chance, and the mean over pairs."""

    def distance(counts, means):
        counts = torch.tensor(counts).double()
        return input_distance(ClassSums(counts, (counts * torch.tensor(means))[..., None], 1.0))

    # Means of all rows are alike, of which 1 / 8 + 1 / 4 is expected of chance; nothing is known of the third group.
    assert distance([[4, 4, 0], [4, 0, 0], [0, 0, 5]], [[3, -3, 0], [0, 0, 0], [0, 0, 9]]) == pytest.approx(-0.375)
    assert distance([[2], [2], [2]], [[0], [2], [4]]) == pytest.approx((3 + 3 + 15) / 3)
    # Classes count by what is known of them, 3 / 4 and 1 / 4: of the difference 3 / 4 * 4 chance makes 1 / 2.
    assert distance([[3, 1], [3, 1]], [[0, 90], [4, 90]]) == pytest.approx(9 - 0.5)
    # Proportions are those of labels, whatever lies nearest: each class counts half, of which 3 / 4 is known.
    assert distance([[3, 1], [1, 3]], [[0, 90], [90, 0]]) == pytest.approx(-1 / 1.5)
    # Under another label is what lies nearest, and known are 3 * 1 / 4 of each.
    assert distance([[3, 1], [3, 1]], [[0, 90], [90, 0]]) == pytest.approx(-1 / 1.5)


def test_inputs_of_alike_groups_are_apart_by_nothing_on_average():
    """Subtracts what is expected of chance, of few rows: the smaller of two estimates lies a little below 0."""
    generator, counts = torch.Generator().manual_seed(0), torch.tensor([[6.0, 3.0], [2.0, 9.0]]).double()
    noise = torch.randn(2000, *counts.shape, D, generator=generator).double() * counts.sqrt()[..., None]
    found = torch.tensor([input_distance(ClassSums(counts, each, D)) for each in noise])
    assert -0.3 < found.mean().item() < 0.01


def test_evidence_is_the_bayes_factor_of_one_mean_against_two():
    """Compares in one direction the densities of a difference with, and without, what groups differ by."""
    first = ClassSums(torch.tensor([[4.0, 3.0]]), torch.tensor([[[8.0], [3.0]]]), 1)
    second = ClassSums(torch.tensor([[12.0, 0.0]]), torch.tensor([[[6.0], [0.0]]]), 1)
    # Of class 1 nothing is known of the second; means of class 0 are 2 and .5 with variances 1 / 4 and 1 / 12.
    chance, between, difference = 1 / 4 + 1 / 12, 0.7, torch.tensor(1.5)
    log_density = {v: Normal(0.0, v**0.5).log_prob(difference) for v in (chance, chance + between)}
    expected = 2 * (log_density[chance] - log_density[chance + between])
    torch.testing.assert_close(_evidence(first, second, between)[0, 0], expected)


SIZES = {
    "equal": [0, 1, 2, 3] * 4,
    "unequal": [0] * 9 + [1] * 4 + [2] * 2 + [3],
    "two": [0, 1] * 8,
    "one each": [0, 1, 2, 3],
    "one for all": [0] * 5,
}


@pytest.mark.parametrize("groups", SIZES.values(), ids=SIZES)
def test_groups_are_found_of_whatever_size(groups):
    num_groups = max(groups) + 1
    found = groups_of(in_common(clients_of_groups(groups, means_of_groups(4, 0.7), [EVERY] * len(groups))), num_groups)
    assert adjusted_rand_score(groups, found.tolist()) == 1
    assert found.unique().tolist() == list(range(num_groups))


def test_groups_of_clients_of_few_classes_are_found():
    """Finds them although of many pairs nothing is known: whom both are like tells."""
    groups = [0, 1, 2, 3] * 8
    classes = [[client % 12, (client * client + 1) % 12, (3 * client + 2) % 12] for client in range(32)]
    known = in_common(clients_of_groups(groups, means_of_groups(4, 0.6, num_classes=12), classes))
    assert adjusted_rand_score(groups, groups_of(known, 4).tolist()) == 1


def clients_of_kinds(seed: int) -> tuple[list[int], ClassSums]:
    """
    Makes six clients of each of three kinds of pictures, of which one varies twice as much as another. Two kinds have
    classes in common, the third has none with them.
    """
    kinds, generator = [0, 1, 2] * 6, torch.Generator().manual_seed(seed)
    classes = [range(30), range(8), range(30, 38)]
    means_kCd = 0.3 * torch.randn(3, 38, 64, generator=generator)
    clients = []
    for kind in kinds:
        labels_N = torch.tensor(classes[kind])[torch.randint(len(classes[kind]), (100,), generator=generator)]
        noise_Nd = torch.randn(100, 64, generator=generator) * [1.4, 1.0, 0.7][kind]
        clients.append(ClientStatistics.of(means_kCd[kind][labels_N] + noise_Nd, labels_N, 38))
    return kinds, in_common(clients)


@pytest.mark.parametrize("seed", range(5))
def test_groups_of_clients_that_vary_more_than_others_are_found(seed):
    """Needs each client's own spread, to know what chance does, and the pairs that differ, to know by how much."""
    kinds, known = clients_of_kinds(seed)
    assert adjusted_rand_score(kinds, groups_of(known, 3).tolist()) == 1


def test_clients_that_vary_more_seem_no_further_apart():
    kinds, known = clients_of_kinds(0)
    same_MM = torch.tensor(kinds)[:, None] == torch.tensor(kinds)
    for kind in range(3):
        of_kind = torch.tensor(kinds) == kind
        alike = shifts(known)[of_kind][:, of_kind][~torch.eye(6, dtype=torch.bool)]
        assert alike.mean().abs() < 2
    assert shifts(known)[(shifts(known) != 0) & ~same_MM].mean() > 5


def test_how_much_groups_differ_is_told_by_the_pairs_that_do():
    """Estimates it from few pairs, of one stranger, and from most, of seven groups."""
    for groups in ([0] * 11 + [1], [0, 1] * 6, [0] * 3 + list(range(1, 7))):
        means_gCd = means_of_groups(7, 1.5)
        known = in_common(clients_of_groups(groups, means_gCd, [EVERY] * len(groups)))
        differ = torch.tensor(groups)[:, None] != torch.tensor(groups)
        expected = (shifts(known)[differ].mean() / D).item()
        assert _variance_between(known) == pytest.approx(expected, rel=0.1)


def test_how_much_groups_differ_is_told_where_clients_come_in_the_order_of_their_groups():
    """Compares a part of the clients, which would be of one group were every so manyth taken."""
    groups = [0, 1] * 100
    known = in_common(clients_of_groups(groups, means_of_groups(2, 1.5), [EVERY] * 200, rows=30))
    differ = torch.tensor(groups)[:, None] != torch.tensor(groups)
    assert _variance_between(known) == pytest.approx((shifts(known)[differ].mean() / D).item(), rel=0.1)


def test_features_that_never_vary_and_copies_of_others_tell_nothing():
    """Clients seem as far apart, and by chance as far, with them as without."""
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(60, 4, generator=generator) for _ in range(12)]
    labels = [torch.randint(3, (60,), generator=generator) for _ in range(12)]
    few = in_common([ClientStatistics.of(x, y, 3) for x, y in zip(features, labels, strict=True)])
    more = [torch.cat([x, x, 2 * x[:, :1], torch.full((60, 20), 3.0)], dim=1) for x in features]
    many = in_common([ClientStatistics.of(x, y, 3) for x, y in zip(more, labels, strict=True)])
    assert few.size == pytest.approx(4, rel=2e-3) and many.size == pytest.approx(4, rel=2e-3)
    torch.testing.assert_close(many.count_MC, few.count_MC, rtol=5e-3, atol=0)
    torch.testing.assert_close(shifts(many), shifts(few), rtol=0, atol=0.01)
    torch.testing.assert_close(strays(many), strays(few), rtol=5e-3, atol=0)


def test_clients_without_groups_are_divided_without_an_error():
    alike = in_common(clients_of_groups([0] * 6, means_of_groups(1, 1.0), [EVERY] * 6))
    assert groups_of(alike, 3).unique().tolist() == [0, 1, 2]
    # Nor where clients have no class in common.
    alone = torch.eye(3).double() * 5
    assert groups_of(ClassSums(alone, alone[..., None] * torch.ones(5).double(), 5), 2).unique().tolist() == [0, 1]


def test_what_is_given_stays_as_it_is():
    given = in_common(clients_of_groups([0, 1] * 3, means_of_groups(2, 1.0), [EVERY] * 6))
    before = copy.deepcopy(given)
    groups_of(given, 2)
    assert torch.equal(given.count_MC, before.count_MC) and torch.equal(given.sum_MCd, before.sum_MCd)


def test_groups_keep_their_numbers():
    old_M = torch.tensor([2, 2, 0, 0, 1, -1, -1])
    assert with_old_names(torch.tensor([0, 0, 1, 1, 2, 2, 0]), old_M, 3).tolist() == [2, 2, 0, 0, 1, 1, 2]
    # One moves, the others stay what they are.
    assert with_old_names(torch.tensor([0, 1, 1, 1, 2, 0, 0]), old_M, 3).tolist() == [2, 0, 0, 0, 1, 2, 2]
    assert with_old_names(torch.tensor([1, 0, 2]), torch.tensor([-1, -1, -1]), 3).unique().numel() == 3
