"""Shares of a batch."""

import pytest

from hf_fedmoe.federation import Processes, ProcessGroup


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_are_every_row_once_and_none_is_empty(size):
    batch, rows, weights = [10 + index for index in range(size)], [], []
    for index in range(3):
        own, weight = ProcessGroup(Processes(index, 3), active=True).share(batch)
        assert own
        rows += own if weight else []
        weights.append(weight)
    assert sorted(rows) == batch and sum(weights) == pytest.approx(1)
    assert weights == [len(batch[index::3]) / size for index in range(3)]


def test_alone_nothing_is_shared():
    process_group = ProcessGroup(Processes(1, 3))
    assert process_group.share([4, 5]) == ([4, 5], 1.0) and process_group.seed(7) == 7
    process_group.active = True
    assert process_group.seed(7) != 7
