"""The data of a server whose clients are elsewhere: its own rows, and how many rows each client says that it has."""

import numpy as np
from datasets import ClassLabel, Dataset

from ..data import FederatedDataset
from ..data.common_features import check_dataset, one_table
from ..data.label_maps import with_one_label_map
from ..data.labels import check_label_range, read_labels, resolve_classes


class ServerDataset(FederatedDataset):
    """
    Reserved, validation and test rows, and M clients of which there is a number of rows each.

    It is a [`~data.FederatedDataset`] whose clients have no rows here: `client_sizes` is what their nodes report, 0
    for those that have not come yet.

    Args:
        num_clients (`int`): M.
        reserved (`datasets.Dataset`, *optional*): The server's reserved set.
        validation (`datasets.Dataset`, *optional*): Rows for choosing between checkpoints, with the same columns.
            One of the two is needed, to try out the model and to watch the server.
        test (`datasets.Dataset`, *optional*): Test set; only its labels must agree.
        label_column (`str`, *optional*, defaults to `"label"`): Column of labels, here and at the nodes.
        num_labels (`int`, *optional*): Number of classes, when the column holds integers without names.

    Raises:
        ValueError: When the server has no rows of its own, or labels are none.
    """

    def __init__(
        self,
        num_clients: int,
        reserved: Dataset | None = None,
        validation: Dataset | None = None,
        test: Dataset | None = None,
        label_column: str = "label",
        num_labels: int | None = None,
    ):
        if num_clients < 1:
            raise ValueError(f"`num_clients` is {num_clients}: give at least 1.")
        given = {"reserved": reserved, "validation": validation}
        own = {name: rows for name, rows in given.items() if rows is not None}
        if not own:
            raise ValueError(
                "`reserved` and `validation` are None, but a server needs some rows of its own, to try out its model: "
                "give it a few labelled ones as `validation`."
            )
        own_test = {} if test is None else {"test": test}
        for name, dataset in {**own, **own_test}.items():
            check_dataset(dataset, name)
        labelled = with_one_label_map(own, own_test, label_column)
        self._test = labelled.pop("test", None)
        self.pool, rows = one_table(labelled)
        nothing = np.array([], dtype=np.int64)
        self.client_indices = [nothing] * num_clients
        self.split_indices = dict(rows)
        self.unseen_indices, self.client_test_indices = [], []
        self.given_client_names = None
        self.label_column = label_column
        every = {"pool": read_labels(self.pool, label_column, "pool")}
        if self._test is not None:
            every["test"] = read_labels(self._test, label_column, "test")
        self._labels, self._test_labels = every["pool"], every.get("test")
        feature = self.pool.features[label_column]
        self.has_label_names = isinstance(feature, ClassLabel)
        self.num_labels, self.label_names = resolve_classes(feature, every, num_labels, label_column)
        for name, labels in every.items():
            check_label_range(labels, self.num_labels, label_column, name)
        self.sizes_M = np.zeros(num_clients, dtype=np.int64)

    @property
    def client_sizes(self) -> np.ndarray:
        """Rows of each client, shape `[M]`, as its node reports."""
        return self.sizes_M

    def client(self, client: int | str) -> Dataset:
        """Raises `ValueError`: no row of a client is here."""
        raise ValueError(f"The rows of client {client} are at its node, and stay there.")
