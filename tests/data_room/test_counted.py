"""Numbers in what is printed, and lines in which they are likely to be one."""

from hf_fedmoe.data import FederatedDataset
from hf_fedmoe.data.counted import counted
from hf_fedmoe.training.progress import last_line
from tests.tiny_federation import tiny_rows


def test_one_and_others():
    assert [counted(count, "client") for count in range(3)] == ["0 clients", "1 client", "2 clients"]
    assert counted(1, "class", "classes") == "1 class" and counted(3, "class", "classes") == "3 classes"


def test_lines_of_one():
    data = FederatedDataset(tiny_rows(6), [[0]], client_tests=[[1]])
    assert data.summary().startswith("1 client with 1 row (1 to 1 each), 3 classes; 1 test row of the clients' own\n")
    assert last_line(1, {"train_runtime": 2.0}) == "1 round  2.0 s"
