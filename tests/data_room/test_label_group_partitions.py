import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_fedmoe.data import pachinko


QUICK = settings(max_examples=25, deadline=None, derandomize=True)
SEEDS = st.integers(0, 2**32 - 1)
EVEN = 1e8  # a concentration at which all shares are equal
FINE = np.random.default_rng(0).permutation(np.repeat(np.arange(20), 100))  # four coarse labels of five fine ones
COARSE = FINE // 5


def assert_disjoint(parts, num_rows, size):
    every = np.concatenate(parts)
    assert every.dtype == np.int64
    assert len(np.unique(every)) == len(every)
    assert every.min() >= 0 and every.max() < num_rows
    assert all(len(part) == size and (np.diff(part) > 0).all() for part in parts)


@QUICK
@given(num_clients=st.integers(1, 10), size=st.integers(1, 200), alpha=st.sampled_from([0.001, 0.4, 100]), seed=SEEDS)
def test_pachinko_gives_every_client_its_rows(num_clients, size, alpha, seed):
    parts = pachinko(COARSE, FINE, num_clients, size, alpha, alpha, seed)
    assert len(parts) == num_clients
    assert_disjoint(parts, len(FINE), size)
    again = pachinko(COARSE.tolist(), FINE.tolist(), num_clients, size, alpha, alpha, seed)
    for a, b in zip(parts, again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_pachinko_at_the_size_of_cifar100_uses_every_row():
    fine = np.repeat(np.arange(100), 600)
    parts = pachinko(fine // 5, fine, 100, 600)
    assert_disjoint(parts, 60_000, 600)
    assert any((a != b).any() for a, b in zip(parts, pachinko(fine // 5, fine, 100, 600, seed=1), strict=True))


def test_pachinko_with_large_alphas_is_nearly_equal():
    fine = np.repeat(np.arange(20), 5000)
    parts = pachinko(fine // 5, fine, 10, 2000, EVEN, EVEN)
    counts_MF = np.array([np.bincount(fine[part], minlength=20) for part in parts])
    assert np.abs(counts_MF - 100).max() < 40  # standard deviation 9.7


def test_pachinko_alphas_set_the_skew_of_each_level():
    fine = np.repeat(np.arange(20), 5000)
    coarse = fine // 5
    for coarse_alpha, fine_alpha, of_coarse, of_fine in ((0.01, EVEN, 0.95, 0.2), (EVEN, 0.01, 0.25, 0.95)):
        coarse_shares, fine_shares = [], []
        for part in pachinko(coarse, fine, 40, 500, coarse_alpha, fine_alpha):
            counts_GF = np.bincount(fine[part], minlength=20).reshape(4, 5)
            main_F = counts_GF[counts_GF.sum(axis=1).argmax()]
            coarse_shares.append(main_F.sum() / 500)
            fine_shares.append(main_F.max() / main_F.sum())
        assert np.mean(coarse_shares) == pytest.approx(of_coarse, abs=0.05)
        assert np.mean(fine_shares) == pytest.approx(of_fine, abs=0.05)


def test_pachinko_an_exhausted_fine_label_leaves_its_share_to_its_siblings():
    fine = np.repeat([0, 1, 2], [5, 1000, 1000])
    coarse = np.repeat([0, 0, 1], [5, 1000, 1000])
    counts = np.bincount(fine[pachinko(coarse, fine, 1, 800, EVEN, EVEN)[0]])
    # Half of the rows stay with coarse label 0; over all fine labels alike it would be a third.
    assert counts[0] == 5 and counts[:2].sum() == pytest.approx(400, abs=70)  # standard deviation 14


def test_pachinko_an_exhausted_coarse_label_leaves_its_share_to_the_others():
    coarse = np.repeat([7, 8, 9], [30, 1000, 1000])
    counts = np.bincount(coarse[pachinko(coarse, coarse, 1, 630, EVEN, EVEN)[0]])[7:]
    assert counts[0] == 30 and counts[1] == pytest.approx(300, abs=65)  # standard deviation 12


def test_pachinko_what_one_client_exhausts_the_next_does_not_get():
    coarse = np.repeat([0, 1], [50, 50])
    first, second = pachinko(coarse, coarse, 2, 50, coarse_alpha=0.001, seed=0)
    np.testing.assert_array_equal(np.sort(np.concatenate([first, second])), np.arange(100))
    assert {np.bincount(coarse[part], minlength=2).max() for part in (first, second)} == {50}


def test_pachinko_draws_as_one_by_one():
    """The number of rows of a label that runs out midway, against drawing one row after the other."""
    coarse, fine = np.repeat([0, 0, 1], [4, 9, 9]), np.repeat([0, 1, 2], [4, 9, 9])
    batched = [np.bincount(fine[pachinko(coarse, fine, 1, 16, EVEN, EVEN, seed)[0]]) for seed in range(2000)]
    rng = np.random.default_rng(0)
    single = []
    for _ in range(2000):
        left = np.array([4, 9, 9])
        for _ in range(16):
            under = [[f for f in siblings if left[f]] for siblings in ((0, 1), (2,))]
            siblings = [fines for fines in under if fines]
            fines = siblings[rng.integers(len(siblings))]
            left[fines[rng.integers(len(fines))]] -= 1
        single.append(np.array([4, 9, 9]) - left)
    np.testing.assert_allclose(np.mean(batched, axis=0), np.mean(single, axis=0), atol=0.15)
    np.testing.assert_allclose(np.std(batched, axis=0), np.std(single, axis=0), atol=0.15)


def test_pachinko_errors():
    with pytest.raises(ValueError, match=r"Fine label 3 is under the coarse labels 0 and 1 .row 2., but must be"):
        pachinko([0, 0, 1, 1], [3, 4, 3, 5], 1, 1)
    with pytest.raises(ValueError, match="10 clients of examples_per_client = 201 need 2010 rows, but there are 2000"):
        pachinko(COARSE, FINE, 10, 201)
    with pytest.raises(ValueError, match="coarse_alpha is 0, but"):
        pachinko(COARSE, FINE, 2, 10, coarse_alpha=0)
    with pytest.raises(ValueError, match="fine_alpha is -1, but"):
        pachinko(COARSE, FINE, 2, 10, fine_alpha=-1)
    with pytest.raises(ValueError, match="coarse_labels has 1999 rows and fine_labels 2000"):
        pachinko(COARSE[1:], FINE, 2, 10)
    with pytest.raises(ValueError, match="examples_per_client is 0"):
        pachinko(COARSE, FINE, 2, 0)
