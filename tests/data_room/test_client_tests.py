import numpy as np
import pytest

from hf_fedmoe.data import FederatedDataset, hold_out_client_tests
from tests.tiny_federation import tiny_federation, tiny_rows


def test_every_row_of_a_client_is_trained_on_or_tested_on():
    data = tiny_federation(num_clients=10, client_size=15)
    held = hold_out_client_tests(data, test_share=0.2, unseen_share=0.3, seed=4)
    assert held.num_clients == 7 and len(held.unseen_indices) == 3 and len(held.client_test_indices) == 10
    before = {tuple(rows) for rows in data.client_indices}
    after = set()
    for client in range(10):
        train, test = held.client_rows(client), held.client_test_indices[client]
        assert len(test) == 3 and not np.intersect1d(train, test).size
        after.add(tuple(np.sort(np.concatenate([train, test]))))
        assert held.client_test(client)["input_ids"] == data.pool.select(test)["input_ids"]
        assert held.client(client)["label"] == data.pool.select(train)["label"]
    assert after == before
    assert held.validation["label"] == data.validation["label"]
    title = held.summary().splitlines()[0]
    assert title.startswith("7 clients with 84 rows") and title.endswith(
        "; 30 test rows of the clients' own; 3 unseen clients"
    )


def test_the_draw_follows_from_the_seed_and_keeps_rows_when_clients_are_set_aside():
    data = tiny_federation(num_clients=10)
    first, again, other = (hold_out_client_tests(data, unseen_share=0.2, seed=seed) for seed in (1, 1, 2))
    assert first.state_fingerprint() == again.state_fingerprint() != other.state_fingerprint()
    whole = hold_out_client_tests(data, seed=1)
    tests = {tuple(rows) for rows in whole.client_test_indices}
    assert {tuple(rows) for rows in first.client_test_indices} == tests
    assert whole.state_fingerprint() != data.state_fingerprint()


def test_small_shares_still_hold_out_one():
    held = hold_out_client_tests(tiny_federation(num_clients=3), test_share=0.01, unseen_share=0.01)
    assert len(held.unseen_indices) == 1 and [len(rows) for rows in held.client_test_indices] == [1, 1, 1]
    assert held.map(lambda row: {"two": 2}).client_test(2)["two"] == [2]


def test_own_client_tests_and_unseen_clients():
    data = FederatedDataset(tiny_rows(9), [[0, 1], [2]], unseen_clients=[[3, 4]], client_tests=[[5], [6], [7, 8]])
    assert data.num_clients == 2 and data.client_rows(2).tolist() == [3, 4] and len(data.client_test(2)) == 2
    with pytest.raises(IndexError, match="client 3 does not exist: there are 3 clients, 0 to 2"):
        data.client_test(3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"client_tests": [[5]]}, "client_tests has 1 entries for 2 clients"),
        ({"client_tests": [[5], [1]]}, "client 0 and test of client 1 overlap: row 1"),
        ({"unseen_clients": [[0]]}, "client 0 and unseen client 2 overlap"),
    ],
)
def test_rows_that_overlap_or_are_missing(fields, message):
    with pytest.raises(ValueError, match=message):
        FederatedDataset(tiny_rows(9), [[0, 1], [2]], **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"test_share": 1.0}, r"`test_share` is 1.0: give a share in \(0, 1\)"),
        ({"unseen_share": -0.1}, r"`unseen_share` is -0.1"),
        ({"unseen_share": 0.95}, r"`unseen_share` is 0.95, which leaves none of 4 clients"),
    ],
)
def test_bad_shares(fields, message):
    with pytest.raises(ValueError, match=message):
        hold_out_client_tests(tiny_federation(), **fields)


def test_nothing_to_divide():
    with pytest.raises(
        ValueError,
        match=r"Client 1 has 1 row, .*: give it two or more \(`min_size=2` of a partition\), or hold none out",
    ):
        hold_out_client_tests(FederatedDataset(tiny_rows(4), [[0, 1, 2], [3]]))
    with pytest.raises(ValueError, match="has client tests or unseen clients already"):
        hold_out_client_tests(hold_out_client_tests(tiny_federation()))
    with pytest.raises(ValueError, match="client_tests is empty"):
        tiny_federation().client_test(0)
