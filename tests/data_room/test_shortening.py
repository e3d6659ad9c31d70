import pytest

from hf_fedmoe.data import hold_out_client_tests, with_fewer_rows
from tests.tiny_federation import tiny_federation


def test_clients_keep_rows_at_equal_distances_and_the_server_all():
    data = hold_out_client_tests(tiny_federation(num_clients=3, client_size=15), test_share=0.2)
    before = [rows.tolist() for rows in data.client_indices]
    few = with_fewer_rows(data, 3)
    # The first, the middle and the last of twelve: a client whose rows are sorted by class keeps some of several.
    assert [rows.tolist() for rows in few.client_indices] == [[rows[0], rows[5], rows[11]] for rows in before]
    assert few.client_sizes.tolist() == [3, 3, 3]
    assert few.reserved["label"] == data.reserved["label"] and few.validation["label"] == data.validation["label"]
    assert few.client_test(0)["label"] == data.client_test(0)["label"]
    assert [rows.tolist() for rows in data.client_indices] == before


def test_clients_of_few_rows_keep_them_all():
    data = tiny_federation(num_clients=2, client_size=5)
    few = with_fewer_rows(data, 5)
    assert [rows.tolist() for rows in few.client_indices] == [rows.tolist() for rows in data.client_indices]
    with pytest.raises(ValueError, match="`most` is 0: leave every client at least 1 row"):
        with_fewer_rows(data, 0)
