"""Processes by themselves; tests/invariants/test_two_processes.py starts two."""

from hypothesis import given
from hypothesis import strategies as st

from hf_fedmoe.federation import Processes, balance


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


def test_one_process_alone_raises_its_own_error():
    assert Processes().gather(lambda: 3) == [3]
    try:
        Processes().gather(lambda: 1 / 0)
    except ZeroDivisionError as error:
        assert error.__context__ is None
    else:
        raise AssertionError
