import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_fedmoe.data import dirichlet, hold_out, hold_out_ids, hold_out_predominant, iid, natural, predominant, shards
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


def cumulative_shares(parts, labels):
    counts_MC = np.array([np.bincount(labels[part], minlength=labels.max() + 1) for part in parts])
    return np.cumsum(counts_MC / np.bincount(labels), axis=0)


@QUICK
@given(num_groups=st.integers(1, 10), num_clients=st.integers(1, 8), seed=SEEDS)
def test_dirichlet_groups_share_their_proportions(num_groups, num_clients, seed):
    sizes_C = np.arange(200, 300, 10)
    labels = np.repeat(np.arange(10), sizes_C)
    parts = dirichlet(labels, num_clients, 1.0, seed, min_size=0, num_groups=num_groups)
    assert_disjoint(parts, len(labels))
    assert sum(map(len, parts)) == len(labels)
    assert_equal_parts(parts, dirichlet(labels, num_clients, 1.0, seed, min_size=0, num_groups=num_groups))
    # Replaying the seed names the groups; a class is cut at their shares, to the nearest row.
    rng = np.random.default_rng(seed)
    group_C = rng.permutation(np.arange(10) % num_groups)
    members = np.bincount(group_C)
    assert len(members) == num_groups and members.max() - members.min() <= 1
    shares_MC = np.cumsum(rng.dirichlet(np.ones(num_clients), size=num_groups), axis=1).T[:, group_C]
    assert (np.abs(cumulative_shares(parts, labels) - shares_MC) * sizes_C <= 0.5 + 1e-6).all()


def test_dirichlet_groups_are_three_on_ten_classes():
    labels = np.random.default_rng(4).permutation(np.repeat(np.arange(10), 1000))
    counts_MC = np.array([np.bincount(labels[part]) for part in dirichlet(labels, 8, 0.4, seed=1, num_groups=3)])
    proportions, members = np.unique(counts_MC, axis=1, return_counts=True)
    assert proportions.shape == (8, 3) and sorted(members) == [3, 3, 4]
    others = [
        np.array([np.bincount(labels[part], minlength=10) for part in dirichlet(labels, 8, 0.4, 1, 0, groups)])
        for groups in (1, 10)
    ]
    assert [len(np.unique(counts, axis=1).T) for counts in others] == [1, 10]


def test_dirichlet_groups_at_a_large_alpha_are_nearly_equal():
    labels = np.repeat(np.arange(10), 500)
    parts = dirichlet(labels, 10, 1e6, num_groups=3)
    assert all(np.abs(np.bincount(labels[part]) - 50).max() <= 2 for part in parts)


def test_dirichlet_without_groups_draws_for_each_class_as_before():
    labels = np.repeat(np.arange(4), 300)
    parts = dirichlet(labels, 3, 0.5, seed=7)
    rng = np.random.default_rng(7)
    cuts_CM = np.rint(np.cumsum(rng.dirichlet(np.full(3, 0.5), size=4), axis=1) * 300).astype(int)
    rows_by_class = [np.split(rng.permutation(300) + 300 * c, cuts_CM[c, :2]) for c in range(4)]
    assert_equal_parts(parts, [np.sort(np.concatenate(chunks)) for chunks in zip(*rows_by_class, strict=True)])


def test_dirichlet_errors():
    for num_groups in (0, 6):
        with pytest.raises(ValueError, match=f"num_groups is {num_groups}, but 5 classes make 1 to 5 groups"):
            dirichlet(FIVE_CLASSES, 5, alpha=1.0, num_groups=num_groups)
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


@QUICK
@given(seed=SEEDS, num_clients=st.sampled_from([None, 1, 7]), max_size=st.integers(1, 40))
def test_natural_keeps_at_most_max_size(seed, num_clients, max_size):
    ids = np.random.default_rng(1).integers(0, 60, size=600)
    whole, parts = (natural(ids, num_clients, seed, max_size=size) for size in (None, max_size))
    assert_disjoint(parts, len(ids))
    for all_rows, rows in zip(whole, parts, strict=True):
        assert len(rows) == min(len(all_rows), max_size)
        assert np.isin(rows, all_rows).all()
        if len(all_rows) <= max_size:
            np.testing.assert_array_equal(rows, all_rows)
    assert_equal_parts(parts, natural(ids, num_clients, seed, max_size=max_size))
    assert_equal_parts(whole, natural(ids, num_clients, seed, max_size=600))


def test_natural_draws_uniformly_what_it_keeps():
    kept = np.bincount(np.concatenate([natural(["a"] * 10, seed=seed, max_size=3)[0] for seed in range(1000)]))
    assert kept.sum() == 3000 and kept.min() > 240 and kept.max() < 360  # 300 each, standard deviation 14.5


def test_natural_leaves_small_ids_out_before_it_cuts():
    parts = natural([7, 7, 7, 8, 9, 9], min_size=2, max_size=2)
    assert len(parts) == 2 and set(parts[0]) < {0, 1, 2} and [len(part) for part in parts] == [2, 2]


def test_natural_errors():
    with pytest.raises(ValueError, match=r"max_size is 2, but a client has at least 3 rows .min_size is 3."):
        natural(["a"] * 9, min_size=3, max_size=2)
    with pytest.raises(ValueError, match="max_size is 0, but a client has at least 1 rows"):
        natural(["a"] * 9, min_size=0, max_size=0)
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


@pytest.mark.parametrize("seed", range(4))
def test_hold_out_of_one_predominant_class(seed):
    labels = np.repeat([0, 1, 2], [100, 100, 10])
    held, rest = hold_out_predominant(labels, 40, 0.6, seed)
    np.testing.assert_array_equal(np.sort(np.concatenate([held, rest])), np.arange(210))
    counts = np.bincount(labels[held], minlength=3)
    assert counts.max() == 24 and counts.sum() == 40 and counts.argmax() in (0, 1)  # class 2 has too few rows
    np.testing.assert_array_equal(held, hold_out_predominant(labels, 40, 0.6, seed)[0])
    with pytest.raises(ValueError, match=r"No class has 108 rows for a share of 0\.9 of 120: the largest has 100"):
        hold_out_predominant(labels, 120, 0.9)
    with pytest.raises(ValueError, match="share is 0, but must be above 0"):
        hold_out_predominant(labels, 10, 0)


@QUICK
@given(size=st.one_of(st.integers(0, 59), st.floats(0.01, 0.98)), seed=SEEDS)
def test_hold_out_ids_never_splits_an_id(size, seed):
    ids = np.random.default_rng(5).permutation(np.repeat(np.arange(60), np.arange(1, 61)))
    held, rest = hold_out_ids(ids, size, seed)
    assert held.dtype == rest.dtype == np.int64
    np.testing.assert_array_equal(np.sort(np.concatenate([held, rest])), np.arange(len(ids)))
    assert (np.diff(held) > 0).all() and (np.diff(rest) > 0).all()
    assert not set(ids[held]) & set(ids[rest])
    assert len(set(ids[held])) == (round(size * 60) if isinstance(size, float) else size)
    # Only the order of ids counts, not their values.
    assert_equal_parts((held, rest), hold_out_ids([f"writer {i:02d}" for i in ids], size, seed))


def test_hold_out_ids_takes_each_id_alike():
    ids = ["a"] * 50 + ["b"] * 2 + ["c"]
    sizes = [len(hold_out_ids(ids, 1, seed)[0]) for seed in range(600)]
    assert set(sizes) == {50, 2, 1} and all(150 < sizes.count(size) < 250 for size in (50, 2, 1))


def test_hold_out_ids_errors():
    with pytest.raises(ValueError, match="ids has 1 missing values among 3 rows"):
        hold_out_ids(["a", None, "b"], 1)
    for size in (-1, 1.0, 1.5):
        with pytest.raises(ValueError, match=f"size is {size}, but must be a whole number of ids or a share in"):
            hold_out_ids([1, 1, 2, 3], size)
    with pytest.raises(ValueError, match="Holding out 3 of 3 ids leaves none for the clients"):
        hold_out_ids([1, 1, 2, 3], 3)
    with pytest.raises(ValueError, match=r"size is 0.1, but this share of 3 ids is none"):
        hold_out_ids([1, 1, 2, 3], 0.1)


def test_apportion():
    assert apportion(3, np.array([0.5, 0.3, 0.2])).tolist() == [1, 1, 1]
    assert apportion(10, np.array([1.0, 1.0, 0.0])).tolist() == [5, 5, 0]
    assert apportion(10, np.array([8.0, 1.0, 1.0]), limits=np.array([4, 9, 9])).tolist() == [4, 3, 3]
    assert apportion(0, np.array([1.0, 2.0])).tolist() == [0, 0]
