"""Screens by value, on updates that are made by hand."""

import pytest
import torch
from torch import nn

from hf_fedmoe.federation.screens import Krum, NormRatio, Updates, attackers, krum_scores
from hf_fedmoe.weights import StateLayout


def updates(*moved, model=None, names=None, received=None):
    """Uploads that have moved by these numbers, each in every tensor alike."""
    layout = StateLayout.of(model or nn.Linear(2, 2))
    start_P = torch.zeros(layout.size)
    for view in layout.views(start_P).values():
        view.fill_(5.0)
    received = [start_P] * len(moved) if received is None else received
    rows = [sent_P + value for sent_P, value in zip(received, moved, strict=True)]
    return Updates(layout, rows, received, names or layout.sizes)


def test_updates_are_shortened_to_a_multiple_of_the_median():
    found = updates(1.0, -2.0, 3.0, -40.0)
    verdict = NormRatio(2.0)(found)
    # Norms are those numbers times the root of 6 elements; their median is 2.5.
    assert verdict.dropped == {} and verdict.told == {"shortened_updates": 1.0}
    used = [row_P[:4] - 5.0 for row_P in found.rows]
    for row_4, expected in zip(used, (1.0, -2.0, 3.0, -5.0), strict=True):
        torch.testing.assert_close(row_4, torch.full((4,), expected))


def test_what_does_not_travel_does_not_count():
    found = updates(1.0, 1.0, 4.0, names={"weight"})
    NormRatio(1.0)(found)
    weight, bias = found.layout.views(found.rows[2]).values()
    torch.testing.assert_close(weight, torch.full((2, 2), 6.0))
    assert torch.equal(bias, torch.full((2,), 9.0))


def test_each_is_measured_from_what_that_client_was_sent():
    size = StateLayout.of(nn.Linear(2, 2)).size
    received = [torch.full((size,), value) for value in (0.0, 100.0, 200.0)]
    found = updates(1.0, 1.0, 3.0, received=received)
    NormRatio(2.0)(found)
    assert [round((row_P - sent_P)[0].item(), 4) for row_P, sent_P in zip(found.rows, received, strict=True)] == [
        1,
        1,
        2,
    ]


def test_statistics_have_a_bound_of_their_own():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    found = updates(1.0, 1.0, 1.0, model=model)
    for factor, row_P in zip((1.0, 1.0, 50.0), found.rows, strict=True):
        found.layout.views(row_P)["1.running_var"].fill_(5.0 + 100 * factor)
    found.layout.views(found.rows[1])["0.weight"].fill_(5.0 + 30)
    verdict = NormRatio(1.5)(found)
    assert verdict.told == {"shortened_updates": 2.0}
    views = [found.layout.views(row_P) for row_P in found.rows]
    assert views[1]["0.weight"].max() < 5 + 4 and views[2]["1.running_var"].max() < 5 + 200
    assert torch.equal(views[0]["1.running_var"], torch.full((2,), 105.0))


def test_scores_are_sums_over_the_nearest():
    square_mm = torch.tensor([[0.0, 1.0, 4.0, 9.0], [1.0, 0.0, 1.0, 4.0], [4.0, 1.0, 0.0, 1.0], [9.0, 4.0, 1.0, 0.0]])
    assert krum_scores(square_mm, 0).tolist() == [5.0, 2.0, 2.0, 5.0]  # the two nearest others
    assert krum_scores(square_mm, 1).tolist() == [1.0, 1.0, 1.0, 1.0]
    assert krum_scores(torch.zeros(1, 1), 0).tolist() == [0.0]


def test_krum_leaves_out_who_is_far_and_says_so():
    found = updates(1.0, 1.1, 1.2, 1.3, 9.0, 1.4, -8.0)
    dropped = Krum(0.25)(found).dropped
    assert sorted(dropped) == [4, 6] and attackers(0.25, 7) == 2
    assert dropped[4].startswith("its update is too far from the others': Krum's score is 1")
    dropped = Krum(0.25, many=False)(found).dropped
    assert len(dropped) == 6 and 2 not in dropped


def test_krum_with_nobody_hostile_keeps_all():
    assert Krum(0.0)(updates(1.0, 2.0, 300.0)).dropped == {}
    assert Krum(0.0)(updates(1.0)).dropped == {}


def test_where_nothing_travels_nothing_is_far():
    found = updates(1.0, 2.0, 300.0, names={"another"})
    assert sorted(Krum(0.0, many=False)(found).dropped) == [1, 2]
    assert NormRatio(1.0)(found).told == {"shortened_updates": 0.0}


def test_krum_with_too_few_uploads_reckons_with_fewer_and_says_so(caplog):
    with caplog.at_level("WARNING", logger="hf_fedmoe"):
        dropped = Krum(0.4)(updates(1.0, 1.1, 1.2, 1.3, 9.0)).dropped
    assert sorted(dropped) == [4]
    assert not caplog.records or "reckons with 1 hostile" in caplog.text


@pytest.mark.parametrize(("share", "m", "f"), [(0.3, 10, 3), (0.2, 3, 1), (0.0, 7, 0), (0.1, 10, 1), (0.34, 3, 2)])
def test_a_share_of_clients_is_rounded_up(share, m, f):
    assert attackers(share, m) == f
