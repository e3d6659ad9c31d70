"""Locations by value: against numpy, references in float64 and the limits in which they are the mean."""

import numpy as np
import pytest
import torch
from torch import nn

from hf_fedmoe.weights import StateLayout, by_entries, fuse_geometric_median_, fuse_models_, median, trimmed_mean
from hf_fedmoe.weights.distances import COLUMNS, squared_distances
from hf_fedmoe.weights.reducers import weiszfeld


@pytest.fixture
def layout():
    """Two blocks of columns, and running statistics."""
    return StateLayout.of(nn.Sequential(nn.Linear(COLUMNS, 1), nn.BatchNorm1d(3)))


@pytest.fixture
def plain():
    return StateLayout.of(nn.Linear(5, 3))


def rows(layout, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows_mP = torch.zeros(count, layout.size)
    for slot in layout.slots:  # and nothing between them
        rows_mP[:, slot.start : slot.stop] = torch.randn(count, slot.stop - slot.start, generator=generator)
    for _, variance in layout.batchnorm:
        rows_mP[:, variance.start : variance.stop] = rows_mP[:, variance.start : variance.stop].abs() + 0.1
    return rows_mP


def fused(reducer, layout, weights_Sm, keep_S, m=5):
    bank_SP = rows(layout, len(weights_Sm), seed=1)
    reducer(bank_SP, rows(layout, m), weights_Sm, keep_S, layout)
    return bank_SP


def by_hand(values_m, weights_m, location):
    """A location in float64 of one entry."""
    order = np.argsort(values_m)
    values_m, share_m = values_m[order], weights_m[order] / weights_m.sum()
    if location == "median":
        passed_m = share_m.cumsum()
        lower, upper = (values_m[(passed_m > 0.5 + side).argmax()] for side in (-1e-6, 1e-6))
        return (lower + upper) / 2
    # A share is an interval of [0, 1]; what of it lies in [trim, 1 - trim] counts.
    ends = np.concatenate([[0.0], share_m.cumsum()])
    kept_m = np.clip(np.minimum(ends[1:], 1 - location) - np.maximum(ends[:-1], location), 0, None)
    return (kept_m * values_m).sum() / kept_m.sum()


RULES = {"median": median, 0.0: trimmed_mean(0.0), 0.2: trimmed_mean(0.2), 0.31: trimmed_mean(0.31)}


@pytest.mark.parametrize("m", [1, 2, 5, 6])
def test_equal_weights_give_the_median_of_numpy(plain, m):
    found_SP = fused(by_entries(median), plain, torch.full((1, m), 1 / m), torch.zeros(1), m)
    assert torch.equal(found_SP[0], torch.from_numpy(np.median(rows(plain, m).double().numpy(), 0)).float())


def test_equal_weights_give_the_trimmed_mean_of_whole_rows(plain):
    found_SP = fused(by_entries(trimmed_mean(0.2)), plain, torch.full((1, 5), 0.2), torch.zeros(1))
    expected_P = rows(plain, 5).sort(0).values[1:4].double().mean(0).float()
    torch.testing.assert_close(found_SP[0], expected_P, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", RULES)
def test_each_expert_has_the_location_by_its_own_weights(layout, name):
    weights_Sm = torch.tensor([[0.1, 0.3, 0.0, 0.2, 0.1], [0.0, 0.0, 0.3, 0.0, 0.0], [0.0] * 5])
    keep_S = torch.tensor([0.3, 0.7, 1.0])
    found_SP = fused(by_entries(RULES[name]), layout, weights_Sm, keep_S)
    bank_SP, rows_mP = rows(layout, 3, seed=1).double().numpy(), rows(layout, 5).double().numpy()
    for column in (0, 7, COLUMNS - 1, COLUMNS):
        for s in (0, 1):
            rate = weights_Sm[s].sum().item()
            located = by_hand(rows_mP[:, column], weights_Sm[s].double().numpy(), name)
            expected = keep_S[s].item() * bank_SP[s, column] + rate * located
            assert found_SP[s, column].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    # Nobody of the third weighs anything: it stays as it is, but for the rounding of its variances.
    torch.testing.assert_close(found_SP[2], rows(layout, 3, seed=1)[2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_a_running_variance_is_that_of_a_mixture_by_the_same_location(layout, name):
    [(mean, variance)] = layout.batchnorm
    weights_m = torch.tensor([0.1, 0.3, 0.2, 0.2, 0.2])
    found_P = fused(by_entries(RULES[name]), layout, weights_m[None], torch.zeros(1))[0]
    means_mF = rows(layout, 5)[:, mean.start : mean.stop].double().numpy()
    variances_mF = rows(layout, 5)[:, variance.start : variance.stop].double().numpy()
    for feature in range(3):
        located = by_hand(means_mF[:, feature], weights_m.double().numpy(), name)
        apart_m = (means_mF[:, feature] - located) ** 2
        expected = sum(by_hand(each, weights_m.double().numpy(), name) for each in (variances_mF[:, feature], apart_m))
        assert found_P[variance.start + feature].item() == pytest.approx(expected, rel=1e-5)


def test_trimming_nothing_is_the_mean(layout):
    weights_Sm, keep_S = torch.tensor([[0.1, 0.3, 0.2, 0.2, 0.2], [0.1, 0.0, 0.1, 0.1, 0.2]]), torch.tensor([0.0, 0.5])
    mean_SP = fused(fuse_models_, layout, weights_Sm, keep_S)
    found_SP = fused(by_entries(trimmed_mean(0.0)), layout, weights_Sm, keep_S)
    torch.testing.assert_close(found_SP, mean_SP, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(fused(by_entries(median), layout, weights_Sm, keep_S), mean_SP, atol=1e-3)


def test_one_upload_is_its_own_location(layout):
    for reducer in (by_entries(median), by_entries(trimmed_mean(0.3)), fuse_geometric_median_):
        found_SP = fused(reducer, layout, torch.ones(1, 1), torch.zeros(1), m=1)
        torch.testing.assert_close(found_SP, rows(layout, 1), rtol=1e-6, atol=1e-6)
    geometric_SP = fused(fuse_geometric_median_, layout, torch.ones(1, 1), torch.zeros(1), m=1)
    assert torch.equal(geometric_SP, fused(fuse_models_, layout, torch.ones(1, 1), torch.zeros(1), m=1))


def test_the_geometric_median_has_the_least_sum_of_distances(plain):
    rows_mP = rows(plain, 6)
    rows_mP[5] *= 50
    weights_m = torch.tensor([0.3, 0.2, 0.2, 0.1, 0.1, 0.1])
    found_1P = rows(plain, 1, seed=1)
    fuse_geometric_median_(found_1P, rows_mP, weights_m[None], torch.zeros(1), plain)

    def total(point_P):
        return (weights_m.double() * (rows_mP.double() - point_P).norm(dim=1)).sum().item()

    # A reference of its own: descent on the sum of distances, in float64.
    point_P = rows_mP.double().mean(0).requires_grad_()
    optimizer = torch.optim.LBFGS([point_P], max_iter=500, tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (weights_m.double() * (rows_mP.double() - point_P).norm(dim=1)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(found_1P[0].double(), point_P.detach(), rtol=1e-4, atol=1e-4)
    assert total(found_1P[0].double()) == pytest.approx(total(point_P.detach()), rel=1e-8)
    assert (found_1P[0] - rows_mP[:5].mean(0)).norm() < 0.1 * (rows_mP.mean(0) - rows_mP[:5].mean(0)).norm() + 1


def test_the_geometric_median_of_three_points_on_a_line_is_the_middle_one():
    square_mm = torch.tensor([[0.0, 1.0, 100.0], [1.0, 0.0, 81.0], [100.0, 81.0, 0.0]], dtype=torch.float64)
    weight_m = weiszfeld(torch.full((3,), 1 / 3, dtype=torch.float64), square_mm)
    torch.testing.assert_close(weight_m, torch.tensor([0.0, 1.0, 0.0]).double(), atol=1e-4, rtol=0)
    equal_m = torch.tensor([0.25, 0.75], dtype=torch.float64)
    assert torch.equal(weiszfeld(equal_m, torch.zeros(2, 2, dtype=torch.float64)), equal_m)


@pytest.mark.parametrize("size", [1e5, 1e9, 1e15])
@pytest.mark.parametrize("places", [[0], [5], [0, 3, 8]])
def test_however_far_a_few_rows_are_the_geometric_median_stays_among_the_others(places, size, plain):
    rows_mP = rows(plain, 10)
    honest_mP = rows_mP[[place for place in range(10) if place not in places]]
    for slot in plain.slots:
        rows_mP[places, slot.start : slot.stop] = size
    found_1P = rows(plain, 1, seed=1)
    fuse_geometric_median_(found_1P, rows_mP, torch.full((1, 10), 0.1), torch.zeros(1), plain)
    assert (found_1P[0] - honest_mP.mean(0)).norm() < torch.cdist(honest_mP, honest_mP).max() / 2


def test_the_geometric_median_is_where_half_of_the_weight_is():
    square_mm = torch.full((3, 3), 1e30, dtype=torch.float64).fill_diagonal_(0)
    square_mm[0, 1] = square_mm[1, 0] = 0.0  # two that did not move
    for share_m, wanted_m in (([0.3, 0.3, 0.4], [0.5, 0.5, 0.0]), ([0.05, 0.05, 0.9], [0.0, 0.0, 1.0])):
        found_m = weiszfeld(torch.tensor(share_m, dtype=torch.float64), square_mm)
        torch.testing.assert_close(found_m, torch.tensor(wanted_m, dtype=torch.float64))


@pytest.mark.parametrize("place", [0, 3])
def test_a_row_that_is_far_does_not_hide_the_distances_between_the_others(place, plain):
    rows_mP = rows(plain, 5)
    others = [other for other in range(5) if other != place]
    expected_mm = torch.cdist(*[rows_mP[others].double()] * 2, compute_mode="donot_use_mm_for_euclid_dist") ** 2
    rows_mP[place] *= 1e15
    found_mm = squared_distances(lambda columns: rows_mP[:, columns], plain)[others][:, others]
    torch.testing.assert_close(found_mm, expected_mm, rtol=1e-9, atol=1e-9)


def test_a_few_statistics_that_are_far_are_not_what_distances_are_measured_in(layout):
    rows_mP = rows(layout, 10)
    plain_mm = squared_distances(lambda columns: rows_mP[:, columns], layout)[3:, 3:]
    for slot in layout.batchnorm[0]:
        rows_mP[:3, slot.start : slot.stop] = 1e9
    found_mm = squared_distances(lambda columns: rows_mP[:, columns], layout)[3:, 3:]
    assert found_mm.mean() > 0.6 * plain_mm.mean()  # both kinds still count; a third if one did


def test_distances_are_those_of_rows(plain, layout):
    rows_mP = 1000 + rows(plain, 4)  # far from zero, where products of float32 would have lost them
    found_mm = squared_distances(lambda columns: rows_mP[:, columns], plain)
    expected_mm = torch.cdist(*[rows_mP.double()] * 2, compute_mode="donot_use_mm_for_euclid_dist") ** 2
    torch.testing.assert_close(found_mm, expected_mm, rtol=1e-9, atol=1e-9)


def test_statistics_of_another_size_hide_no_parameters(layout):
    rows_mP = rows(layout, 4)
    [(mean, variance)] = layout.batchnorm
    plain_mm = squared_distances(lambda columns: rows_mP[:, columns], layout)
    large_mP = rows_mP.clone()
    large_mP[:, variance.start : variance.stop] *= 1e3
    large_mP[:, mean.start : mean.stop] *= 1e3
    torch.testing.assert_close(
        squared_distances(lambda columns: large_mP[:, columns], layout), plain_mm, rtol=1e-6, atol=1e-9
    )
    far_mP = rows_mP.clone()
    far_mP[3, :COLUMNS] *= 100
    far_mm = squared_distances(lambda columns: far_mP[:, columns], layout)
    assert far_mm[3, :3].min() > 100 * far_mm[:3, :3].max()
