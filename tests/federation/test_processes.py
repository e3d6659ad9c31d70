"""What processes do by themselves; tests/invariants/test_two_processes.py starts two."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hf_fedmoe.federation import Processes, balance
from hf_fedmoe.weights import StateLayout, fuse_


def test_largest_first_to_the_least_loaded():
    assert balance([3, 5, 4, 5, 1], 2) == [1, 0, 0, 1, 1]
    assert balance([7, 7, 7], 1) == [0, 0, 0]
    assert balance([2], 3) == [0]


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=30), st.integers(1, 8))
def test_no_load_exceeds_the_mean_by_more_than_one_client(sizes, count):
    owners = balance(sizes, count)
    loads = [sum(size for size, owner in zip(sizes, owners, strict=True) if owner == p) for p in range(count)]
    assert sum(loads) == sum(sizes)
    # Who got the last client of the fullest process had the least to do until then.
    assert max(loads) <= sum(sizes) / count + max(sizes) * (1 - 1 / count) + 1e-9


def test_the_weighted_sum_is_the_average_that_fusing_gives():
    layout = StateLayout.of(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double())
    generator = torch.Generator().manual_seed(0)
    rows_mP = torch.rand(3, layout.size, generator=generator, dtype=torch.float64)
    weights_m = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    fused_1P, zero_1 = torch.zeros(1, layout.size, dtype=torch.float64), torch.zeros(1)
    fuse_(fused_1P, rows_mP, weights_m[None], zero_1, layout.batchnorm)
    sum_1P = Processes().weighted_sum(rows_mP, weights_m, layout.batchnorm)
    torch.testing.assert_close(sum_1P, fused_1P, atol=1e-15, rtol=0)


def test_one_process_alone_raises_its_own_error():
    assert Processes().gather(lambda: 3) == [3]
    try:
        Processes().gather(lambda: 1 / 0)
    except ZeroDivisionError as error:
        assert error.__context__ is None
    else:
        raise AssertionError
