import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_fedmoe.data import dirichlet, hold_out, iid, natural, predominant, shards
from hf_fedmoe.data.partitions import apportion


QUICK = settings(max_examples=25, deadline=None, derandomize=True)
SEEDS = st.integers(0, 2**32 - 1)
FIVE_CLASSES = np.random.default_rng(0).choice(5, size=4000, p=[0.1, 0.1, 0.2, 0.25, 0.35])


def assert_disjoint(parts, num_rows):
    every = np.concatenate(parts)
    assert every.dtype == np.int64
    assert len(np.unique(every)) == len(every)
    assert every.min() >= 0 and every.max() < num_rows
    assert all((np.diff(part) > 0).all() for part in parts)


def assert_equal_parts(first, second):
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


@QUICK
@given(num_clients=st.integers(1, 20), extra=st.integers(0, 100), seed=SEEDS)
def test_iid_deals_all_rows_evenly(num_clients, extra, seed):
    num_rows = num_clients + extra
    parts = iid(num_rows, num_clients, seed)
    assert_disjoint(parts, num_rows)
    sizes = [len(part) for part in parts]
    assert sum(sizes) == num_rows and max(sizes) - min(sizes) <= 1
    assert_equal_parts(parts, iid(num_rows, num_clients, seed))


def test_iid_client_size_leaves_rows_over():
    parts = iid(100, 4, client_size=10)
    assert_disjoint(parts, 100)
    assert [len(part) for part in parts] == [10] * 4
    with pytest.raises(ValueError, match="4 clients need 120 rows, but num_rows is 100"):
        iid(100, 4, client_size=30)


@QUICK
@given(
    num_clients=st.integers(1, 12), alpha=st.sampled_from([0.3, 1.0, 100.0]), min_size=st.integers(0, 5), seed=SEEDS
)
def test_dirichlet_covers_all_rows_with_min_size(num_clients, alpha, min_size, seed):
    labels = FIVE_CLASSES[:1000]
    parts = dirichlet(labels, num_clients, alpha, seed, min_size)
    assert_disjoint(parts, len(labels))
    assert sum(map(len, parts)) == len(labels)
    assert min(map(len, parts)) >= min_size
    assert_equal_parts(parts, dirichlet(labels.tolist(), num_clients, alpha, seed, min_size))


def largest_share(parts, labels):
    return np.mean([np.bincount(labels[part]).max() / len(part) for part in parts])


def test_dirichlet_alpha_sets_the_skew():
    labels = np.repeat(np.arange(10), 500)
    strong, mild, none = (largest_share(dirichlet(labels, 10, alpha, seed=3), labels) for alpha in (0.05, 0.5, 1000.0))
    assert strong > 0.6 > mild > 0.2
    assert none == pytest.approx(0.1, abs=0.02)


def test_dirichlet_seed_matters():
    first, second = (dirichlet(FIVE_CLASSES, 5, 0.5, seed) for seed in (0, 1))
    assert any(len(a) != len(b) for a, b in zip(first, second, strict=True))


def test_dirichlet_errors():
    with pytest.raises(ValueError, match=r"alpha is 0, but .* must be above 0"):
        dirichlet(FIVE_CLASSES, 5, alpha=0)
    with pytest.raises(ValueError, match="50 clients of at least 10 rows need 500 rows, but there are 100"):
        dirichlet(FIVE_CLASSES[:100], 50, alpha=1.0, min_size=10)
    with pytest.raises(ValueError, match=r"1000 Dirichlet draws with alpha 0.01 .* min_size is 9. Raise alpha"):
        dirichlet(FIVE_CLASSES[:100], 10, alpha=0.01, min_size=9)
    with pytest.raises(ValueError, match="labels must be a flat sequence of integers"):
        dirichlet(["good", "bad"], 1, alpha=1.0)


@QUICK
@given(ids=st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=200), seed=SEEDS)
def test_natural_one_client_per_id(ids, seed):
    parts = natural(ids, seed=seed)
    assert_disjoint(parts, len(ids))
    assert [{ids[row] for row in part} for part in parts] == [{name} for name in sorted(set(ids))]
    assert sum(map(len, parts)) == len(ids)


def test_natural_leaves_small_ids_out():
    parts = natural([7, 7, 7, 8, 9, 9], min_size=2)
    assert [part.tolist() for part in parts] == [[0, 1, 2], [4, 5]]
    with pytest.raises(ValueError, match=r"None of the 3 ids has min_size = 4 rows .the largest has 3."):
        natural([7, 7, 7, 8, 9, 9], min_size=4)


@QUICK
@given(seed=SEEDS, num_clients=st.integers(1, 10))
def test_natural_groups_whole_ids_evenly(seed, num_clients):
    ids = np.random.default_rng(1).integers(0, 60, size=600)
    parts = natural(ids, num_clients, seed)
    assert_disjoint(parts, len(ids))
    assert sum(map(len, parts)) == len(ids)
    owners = [set(ids[part]) for part in parts]
    assert sum(map(len, owners)) == len(set.union(*owners))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= np.bincount(ids).max()
    assert_equal_parts(parts, natural(ids, num_clients, seed))


def test_natural_errors():
    with pytest.raises(ValueError, match="ids has 2 missing values among 3 rows"):
        natural(["a", None, None])
    with pytest.raises(ValueError, match="num_clients is 3, but there are only 2 different ids"):
        natural(["a", "b", "b"], num_clients=3)
    with pytest.raises(ValueError, match="leaves client 1 with 1 rows, but min_size is 2"):
        natural(["a", "b", "b"], num_clients=2, min_size=2)


@QUICK
@given(num_clients=st.integers(1, 20), shards_per_client=st.integers(1, 4), seed=SEEDS)
def test_shards_hold_few_classes(num_clients, shards_per_client, seed):
    labels = np.random.default_rng(2).permutation(np.repeat(np.arange(10), 100))
    parts = shards(labels, num_clients, shards_per_client, seed)
    assert_disjoint(parts, 1000)
    assert sum(map(len, parts)) == 1000
    num_shards = num_clients * shards_per_client
    spanned = int(np.ceil(1000 / num_shards / 100)) + 1  # classes that one shard can touch
    assert all(len(np.unique(labels[part])) <= shards_per_client * spanned for part in parts)
    assert_equal_parts(parts, shards(labels, num_clients, shards_per_client, seed))


def test_shards_that_fit_classes_give_exactly_two():
    labels = np.repeat(np.arange(10), 100)
    parts = shards(labels, num_clients=5, shards_per_client=2)
    assert all(np.bincount(labels[part], minlength=10).tolist().count(100) == 2 for part in parts)


@QUICK
@given(num_clients=st.integers(1, 10), size=st.integers(2, 80), balanced=st.booleans(), seed=SEEDS)
def test_predominant_shares_and_sizes(num_clients, size, balanced, seed):
    parts = predominant(FIVE_CLASSES, num_clients, size, (0.55, 0.65), seed, balanced)
    assert_disjoint(parts, len(FIVE_CLASSES))
    assert [len(part) for part in parts] == [size] * num_clients
    for client, part in enumerate(parts):
        counts = np.bincount(FIVE_CLASSES[part], minlength=5)
        share = counts[client % 5] / size
        assert 0.55 <= share <= 0.65 or np.ceil(0.55 * size) > np.floor(0.65 * size)
        rest = np.delete(counts, client % 5)
        if balanced:
            assert rest.max() - rest.min() <= 1
    assert_equal_parts(parts, predominant(FIVE_CLASSES, num_clients, size, (0.55, 0.65), seed, balanced))


def test_predominant_rest_is_in_proportion_to_the_data():
    labels = np.repeat([0, 1, 2], [1000, 2000, 6000])
    counts = np.bincount(labels[predominant(labels, 1, 1000, share=0.6)[0]])
    assert counts.tolist() == [600, 100, 300]
    counts = np.bincount(labels[predominant(labels, 1, 1000, share=0.6, balanced_rest=True)[0]])
    assert counts.tolist() == [600, 200, 200]


def test_predominant_draws_shares_from_the_interval():
    labels = np.repeat(np.arange(5), 20_000)
    parts = predominant(labels, 50, 1000, share=(0.4, 0.9), seed=0)
    shares = np.array([np.mean(labels[part] == client % 5) for client, part in enumerate(parts)])
    assert 0.4 <= shares.min() < 0.5 and 0.8 < shares.max() <= 0.9


def test_predominant_names_the_class_that_runs_out():
    labels = np.repeat([0, 1], [30, 1000])
    with pytest.raises(ValueError, match=r"class 0: 60 needed, 30 available\. Lower examples_per_client to about 50"):
        predominant(labels, 1, 100, share=0.6)
    with pytest.raises(ValueError, match=r"share is .0.6, 0.5., but must be"):
        predominant(labels, 1, 10, share=(0.6, 0.5))
    with pytest.raises(ValueError, match="labels has 1 different classes"):
        predominant([1, 1, 1], 1, 1)


@QUICK
@given(size=st.integers(0, 999), seed=SEEDS, stratify=st.booleans())
def test_hold_out_divides_rows(size, seed, stratify):
    labels = FIVE_CLASSES[:1000]
    held, rest = hold_out(labels, size, seed, stratify)
    assert len(held) == size
    np.testing.assert_array_equal(np.sort(np.concatenate([held, rest])), np.arange(1000))
    if stratify and size >= 5:
        assert set(labels[held]) == set(range(5))
        expected = np.bincount(labels) * size / 1000
        assert np.abs(np.bincount(labels[held]) - np.maximum(expected, 1)).max() <= 2


def test_hold_out_takes_a_share_and_keeps_rare_classes():
    labels = np.repeat([0, 1, 2], [989, 10, 1])
    held, _ = hold_out(labels, 0.1)
    assert np.bincount(labels[held]).tolist() == [98, 1, 1]
    with pytest.raises(ValueError, match=r"size is 1.5, but must be"):
        hold_out(labels, 1.5)
    with pytest.raises(ValueError, match="Holding out 1000 of 1000 rows leaves none"):
        hold_out(labels, 1000)


def test_apportion():
    assert apportion(3, np.array([0.5, 0.3, 0.2])).tolist() == [1, 1, 1]
    assert apportion(10, np.array([1.0, 1.0, 0.0])).tolist() == [5, 5, 0]
    assert apportion(10, np.array([8.0, 1.0, 1.0]), limits=np.array([4, 9, 9])).tolist() == [4, 3, 3]
    assert apportion(0, np.array([1.0, 2.0])).tolist() == [0, 0]
