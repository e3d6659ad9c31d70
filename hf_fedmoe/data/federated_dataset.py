"""The data of a federation: clients and the server's splits, all as row indices into one pool."""

import copy
import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from datasets import ClassLabel, Dataset, concatenate_datasets

from .label_distribution import MAX_TABLE_CLIENTS, count_labels, label_table, plot_labels
from .partitions import hold_out, hold_out_predominant
from .split_checks import (
    check_indices,
    check_label_column,
    check_label_range,
    check_same_features,
    read_labels,
    warn_equal_rows,
)


class Partitioner(Protocol):
    """What [`FederatedDataset.from_partitioner`] needs of a partitioner; those of `flwr_datasets` have it."""

    dataset: Dataset

    @property
    def num_partitions(self) -> int: ...

    def load_partition(self, partition_id: int) -> Dataset: ...


class FederatedDataset:
    """
    Clients and server-side splits over one pool of rows.

    Rows are never copied: each client and each split is a list of row indices, and reading it is a `Dataset.select`.
    Everything that could spoil a run is checked here, before any training. Use [`~FederatedDataset.split`] to divide
    one dataset, [`~FederatedDataset.from_clients`] to bring your own clients, and the constructor when you have the
    indices.

    Args:
        pool (`datasets.Dataset`): All rows.
        client_indices (`Sequence[np.ndarray]`): Rows of each of the M clients.
        reserved (`np.ndarray`, *optional*): Rows of the server's reserved set, on which the gate is fitted.
        validation (`np.ndarray`, *optional*): Rows for choosing between checkpoints.
        test (`np.ndarray` or `datasets.Dataset`, *optional*): Rows of the pool, or a dataset of its own with the same
            label column.
        label_column (`str`, *optional*, defaults to `"label"`): Column of integer labels from 0.
        num_labels (`int`, *optional*): Number of classes C. By default that of the column's `ClassLabel` feature, or
            else the largest label plus one.
        unseen_clients (`Sequence[np.ndarray]`, *optional*): Rows of U further clients that take part in no round.
            They have the numbers M to M + U - 1.
        client_tests (`Sequence[np.ndarray]`, *optional*): Test rows of each of the M + U clients, see
            [`hold_out_client_tests`].

    Attributes:
        pool (`datasets.Dataset`): All rows.
        client_indices (`list[np.ndarray]`): M int64 arrays.
        unseen_indices (`list[np.ndarray]`): U int64 arrays, of none unless they were given.
        client_test_indices (`list[np.ndarray]`): M + U int64 arrays, or none.
        split_indices (`dict[str, np.ndarray]`): Rows of `"reserved"`, `"validation"`, `"test"`, as far as they are
            rows of the pool.
        num_clients (`int`), num_labels (`int`), label_names (`list[str]`), label_column (`str`)

    Raises:
        ValueError: When there are no clients, an empty client or split, rows in two splits, a missing label column, or
            labels that are not integers in `[0, num_labels)`.

    Warns:
        UserWarning: When the reserved set lacks a class, or a separate test set repeats rows of the pool.
    """

    def __init__(
        self,
        pool: Dataset,
        client_indices: Sequence[np.ndarray],
        reserved: np.ndarray | None = None,
        validation: np.ndarray | None = None,
        test: np.ndarray | Dataset | None = None,
        label_column: str = "label",
        num_labels: int | None = None,
        unseen_clients: Sequence[np.ndarray] = (),
        client_tests: Sequence[np.ndarray] = (),
    ):
        if len(client_indices) == 0:
            raise ValueError("client_indices is empty: there are no clients. Give at least one array of rows.")
        together = len(client_indices) + len(unseen_clients)
        if len(client_tests) not in (0, together):
            raise ValueError(
                f"client_tests has {len(client_tests)} entries for {together} clients, unseen ones included: give one "
                "array of test rows for each."
            )
        check_label_column(pool, label_column, "pool")
        named = {f"client {i}": rows for i, rows in enumerate(client_indices)}
        given = {"reserved": reserved, "validation": validation, "test": None if isinstance(test, Dataset) else test}
        named |= {name: rows for name, rows in given.items() if rows is not None}
        named |= {f"unseen client {i}": rows for i, rows in enumerate(unseen_clients, len(client_indices))}
        named |= {f"test of client {i}": rows for i, rows in enumerate(client_tests)}
        arrays = check_indices(named, len(pool))

        self.pool = pool
        self.client_indices = [arrays[f"client {i}"] for i in range(len(client_indices))]
        self.split_indices = {name: arrays[name] for name in given if name in arrays}
        self.unseen_indices = [arrays[f"unseen client {i}"] for i in range(len(client_indices), together)]
        self.client_test_indices = [arrays[f"test of client {i}"] for i in range(len(client_tests))]
        self.label_column = label_column
        self._test = test if isinstance(test, Dataset) else None
        self._labels = read_labels(pool, label_column, "pool")
        self._test_labels = None
        if self._test is not None:
            if len(self._test) == 0:
                raise ValueError("test has no rows. Leave it out, or give a dataset with rows.")
            check_label_column(self._test, label_column, "test")
            check_same_features(
                pool.select_columns([label_column]), self._test.select_columns([label_column]), "the pool", "test"
            )
            self._test_labels = read_labels(self._test, label_column, "test")

        self.num_labels, self.label_names = self._resolve_labels(num_labels)
        check_label_range(self._labels, self.num_labels, label_column, "pool")
        if self._test_labels is not None:
            check_label_range(self._test_labels, self.num_labels, label_column, "test")
            clients = pool.select(np.concatenate(self.client_indices))
            parts = {"clients": clients, **{name: pool.select(rows) for name, rows in self.split_indices.items()}}
            warn_equal_rows({**parts, "test": self._test}, label_column, against="test")
        self._warn_missing_classes()

    @classmethod
    def split(
        cls,
        dataset: Dataset,
        partition: Callable[[Dataset], Sequence[np.ndarray]],
        reserved_size: int | float = 0,
        validation_size: int | float = 0,
        test: Dataset | int | float | None = None,
        seed: int = 0,
        label_column: str = "label",
        num_labels: int | None = None,
        stratify: bool = True,
        reserved_share: float | None = None,
    ) -> "FederatedDataset":
        """
        Holds out the server's rows by a seed, and divides what remains among clients.

        Args:
            dataset (`datasets.Dataset`): All rows.
            partition (`Callable[[Dataset], Sequence[np.ndarray]]`): Called with the remaining rows; returns indices
                into them, for example `lambda rows: dirichlet(rows["label"], num_clients=10, alpha=0.3)`. Rows that it
                gives to nobody are dropped.
            reserved_size (`int` or `float`, *optional*, defaults to 0): Rows of the reserved set, or their share of
                `dataset`.
            validation_size (`int` or `float`, *optional*, defaults to 0): The same for validation.
            test (`Dataset`, `int` or `float`, *optional*): A test set of its own, or how much of `dataset` to hold out
                for it.
            seed (`int`, *optional*, defaults to 0): Seed of the hold-outs. The partition has its own.
            label_column (`str`, *optional*, defaults to `"label"`): Column of integer labels.
            num_labels (`int`, *optional*): Number of classes, when the column is no `ClassLabel`.
            stratify (`bool`, *optional*, defaults to `True`): Whether held-out splits keep the proportions of classes,
                with at least one row of each class where their size allows. `False` draws uniformly from all rows.
            reserved_share (`float`, *optional*): Share of one class, drawn at random, in the reserved set, whatever
                `stratify` says; see [`hold_out_predominant`].

        Returns:
            [`FederatedDataset`]: With `pool` the rows of `dataset` that somebody has, in their order there.
        """
        labels = read_labels(dataset, label_column, "dataset") if len(dataset) else np.zeros(0, dtype=np.int64)
        test_size = 0 if test is None or isinstance(test, Dataset) else test
        rng = np.random.default_rng(seed)
        remaining = np.arange(len(dataset))
        held = {}
        for name, size in (("reserved", reserved_size), ("validation", validation_size), ("test", test_size)):
            if size < 0 or (isinstance(size, float) and size >= 1):
                raise ValueError(f"The {name} size is {size}, but must be a number of rows or a share in [0, 1).")
            count = round(size * len(dataset)) if isinstance(size, float) else size
            if count >= len(remaining):
                raise ValueError(
                    f"The {name} size is {count}, but only {len(remaining)} of {len(dataset)} rows remain, and "
                    "clients need some. Lower it."
                )
            if count:
                if name == "reserved" and reserved_share is not None:
                    rows, rest = hold_out_predominant(labels[remaining], count, reserved_share, rng)
                else:
                    rows, rest = hold_out(labels[remaining], count, rng, stratify)
                held[name], remaining = remaining[rows], remaining[rest]
        parts = partition(dataset.select(remaining))
        parts = check_indices({f"client {i}": rows for i, rows in enumerate(parts)}, len(remaining))
        clients = [remaining[rows] for rows in parts.values()]
        if not clients:
            raise ValueError(
                "partition returned no clients. It must return a list with one array of rows for each client."
            )

        # Rows that nobody has leave the pool, so that map() does not tokenise them.
        used = np.sort(np.concatenate([*clients, *held.values()]))
        if len(used) < len(dataset):
            dataset = dataset.select(used)
            clients = [np.searchsorted(used, rows) for rows in clients]
            held = {name: np.searchsorted(used, rows) for name, rows in held.items()}
        if isinstance(test, Dataset):
            held["test"] = test
        return cls(dataset, clients, **held, label_column=label_column, num_labels=num_labels)

    @classmethod
    def from_clients(
        cls,
        clients: Sequence[Dataset],
        reserved: Dataset | None = None,
        validation: Dataset | None = None,
        test: Dataset | None = None,
        label_column: str = "label",
        num_labels: int | None = None,
    ) -> "FederatedDataset":
        """
        Takes clients as they are, one dataset each. The pool is their concatenation, which copies no rows.

        Args:
            clients (`Sequence[datasets.Dataset]`): M datasets with the same columns, types and label map.
            reserved (`datasets.Dataset`, *optional*): The server's reserved set, with the same columns.
            validation (`datasets.Dataset`, *optional*): Validation set, with the same columns.
            test (`datasets.Dataset`, *optional*): Test set; only its label column must agree.
            label_column (`str`, *optional*, defaults to `"label"`): Column of integer labels.
            num_labels (`int`, *optional*): Number of classes, when the column is no `ClassLabel`.

        Returns:
            [`FederatedDataset`]

        Raises:
            ValueError: When there are no clients, one is empty, or features differ.

        Warns:
            UserWarning: When clients, reserved, validation and test have rows of equal content.
        """
        if len(clients) == 0:
            raise ValueError("clients is empty: there are no clients. Give at least one dataset.")
        named = {f"client {i}": dataset for i, dataset in enumerate(clients)}
        named |= {
            name: data for name, data in (("reserved", reserved), ("validation", validation)) if data is not None
        }
        for name, dataset in named.items():
            if len(dataset) == 0:
                raise ValueError(f"{name} has no rows. Leave it out.")
            check_label_column(dataset, label_column, name)
            check_same_features(clients[0], dataset, "client 0", name)

        pool = concatenate_datasets(list(named.values()))
        ends = np.cumsum([len(dataset) for dataset in named.values()])
        rows = dict(zip(named, np.split(np.arange(len(pool)), ends[:-1]), strict=True))
        server = {name: rows[name] for name in ("reserved", "validation") if name in rows}
        if server:
            client_rows = pool.select(range(sum(len(dataset) for dataset in clients)))
            warn_equal_rows({"clients": client_rows, **{name: named[name] for name in server}}, label_column)
        client_indices = [rows[f"client {i}"] for i in range(len(clients))]
        return cls(pool, client_indices, **server, test=test, label_column=label_column, num_labels=num_labels)

    @classmethod
    def from_partitioner(
        cls,
        partitioner: Partitioner,
        reserved: Dataset | None = None,
        validation: Dataset | None = None,
        test: Dataset | None = None,
        label_column: str = "label",
        num_labels: int | None = None,
    ) -> "FederatedDataset":
        """
        Takes clients from a Flower partitioner, or any object with `dataset`, `num_partitions`, `load_partition(i)`.

        A partitioner divides all rows of its dataset, so hold out reserved, validation and test before you set
        `partitioner.dataset`.

        Args:
            partitioner ([`Partitioner`]): With its `dataset` set.
            reserved, validation, test, label_column, num_labels: See [`~FederatedDataset.from_clients`].

        Returns:
            [`FederatedDataset`]
        """
        clients = [partitioner.load_partition(i) for i in range(partitioner.num_partitions)]
        return cls.from_clients(clients, reserved, validation, test, label_column, num_labels)

    @property
    def num_clients(self) -> int:
        """Number of clients M."""
        return len(self.client_indices)

    @property
    def client_sizes(self) -> np.ndarray:
        """Rows of each client, shape `[M]`."""
        return np.array([len(rows) for rows in self.client_indices])

    @property
    def reserved(self) -> Dataset | None:
        """The server's reserved set, or `None`."""
        return self._select("reserved")

    @property
    def validation(self) -> Dataset | None:
        """The validation set, or `None`."""
        return self._select("validation")

    @property
    def test(self) -> Dataset | None:
        """The test set, or `None`."""
        return self._select("test") if self._test is None else self._test

    def client(self, index: int) -> Dataset:
        """
        The rows of one client, as a view of the pool.

        Args:
            index (`int`): From 0 to `num_clients - 1`, then the unseen clients.
        """
        return self.pool.select(self.client_rows(index))

    def client_rows(self, index: int) -> np.ndarray:
        """The rows of the pool that a client, seen or unseen, trains on."""
        count = self.num_clients + len(self.unseen_indices)
        if not 0 <= index < count:
            raise IndexError(f"client {index} does not exist: there are {count} clients, 0 to {count - 1}.")
        unseen = index - self.num_clients
        return self.client_indices[index] if unseen < 0 else self.unseen_indices[unseen]

    def client_test(self, index: int) -> Dataset:
        """
        The test rows of one client, as a view of the pool.

        Args:
            index (`int`): From 0 to `num_clients - 1`, then the unseen clients.

        Raises:
            ValueError: When clients have no test rows.
        """
        if not self.client_test_indices:
            raise ValueError(
                "client_tests is empty: clients have no test rows of their own. Hold some out, "
                "`hold_out_client_tests(data, test_share=0.2)`."
            )
        self.client_rows(index)
        return self.pool.select(self.client_test_indices[index])

    def map(self, function: Callable, **kwargs: Any) -> "FederatedDataset":
        """
        Applies a function to all splits at once, typically a tokenizer; the partition stays.

        Args:
            function (`Callable`): See `datasets.Dataset.map`.
            kwargs: Passed to `datasets.Dataset.map`, for example `batched=True, remove_columns=["text"]`.

        Returns:
            [`FederatedDataset`]: A new one.

        Raises:
            ValueError: When the function changes the number of rows or drops or changes the labels.
        """
        result = copy.copy(self)
        result.pool = self._map_split(self.pool, self._labels, "pool", function, kwargs)
        if self._test is not None:
            result._test = self._map_split(self._test, self._test_labels, "test", function, kwargs)
        return result

    def label_counts(self) -> np.ndarray:
        """Rows of each class at each client, shape `[M, C]`."""
        return count_labels(self._labels, self.client_indices, self.num_labels)

    def summary(self) -> str:
        """
        A readable table: sizes and class counts of clients (the first thirty) and of the server's splits.

        Returns:
            `str`: Several lines.
        """
        shown = min(self.num_clients, MAX_TABLE_CLIENTS)
        counts_MC = self.label_counts()
        names = [f"client {i}" for i in range(shown)] + ["all clients"]
        rows = [*counts_MC[:shown], counts_MC.sum(axis=0)]
        for name in ("reserved", "validation", "test"):
            labels = self._split_labels(name)
            if labels is not None:
                names.append(name)
                rows.append(np.bincount(labels, minlength=self.num_labels))
        table = label_table(names, np.stack(rows), self.label_names).splitlines()
        if shown < self.num_clients:
            table.insert(1 + shown, f"... and {self.num_clients - shown} more clients")
        sizes = self.client_sizes
        title = (
            f"{self.num_clients} clients with {sizes.sum()} rows ({sizes.min()} to {sizes.max()} each), "
            f"{self.num_labels} classes"
        )
        if self.client_test_indices:
            title += f"; {sum(map(len, self.client_test_indices))} test rows of the clients' own"
        if self.unseen_indices:
            title += f"; {len(self.unseen_indices)} unseen clients"
        return "\n".join([title, *table])

    def plot(self, path: str | os.PathLike) -> None:
        """
        Writes a picture of the clients: one bar each, stacked by class.

        Args:
            path (`str` or `os.PathLike`): Image file; its suffix is the format.
        """
        plot_labels(self.label_counts(), self.label_names, path)

    def state_fingerprint(self) -> str:
        """
        A short hash of the partition and the labels, equal before and after [`~FederatedDataset.map`].

        A checkpoint keeps it, so that a run is not resumed on other data.

        Returns:
            `str`: 16 hexadecimal digits.
        """
        digest = hashlib.sha256(f"{self.num_labels} {len(self.pool)}".encode())
        named = {f"client {i}": rows for i, rows in enumerate(self.client_indices)} | self.split_indices
        named |= {f"unseen {i}": rows for i, rows in enumerate(self.unseen_indices)}
        named |= {f"client test {i}": rows for i, rows in enumerate(self.client_test_indices)}
        for name, rows in named.items():
            digest.update(f"{name} {len(rows)}".encode())
            digest.update(rows.astype("<i8").tobytes())
            digest.update(self._labels[rows].astype("<i8").tobytes())
        if self._test_labels is not None:
            digest.update(f"test {len(self._test_labels)}".encode())
            digest.update(self._test_labels.astype("<i8").tobytes())
        return digest.hexdigest()[:16]

    def __repr__(self) -> str:
        splits = [name for name in ("reserved", "validation", "test") if self._split_labels(name) is not None]
        return (
            f"FederatedDataset(num_clients={self.num_clients}, num_labels={self.num_labels}, splits={splits}, "
            f"pool={len(self.pool)} rows)"
        )

    def _select(self, name: str) -> Dataset | None:
        return self.pool.select(self.split_indices[name]) if name in self.split_indices else None

    def _split_labels(self, name: str) -> np.ndarray | None:
        if name == "test" and self._test_labels is not None:
            return self._test_labels
        return self._labels[self.split_indices[name]] if name in self.split_indices else None

    def _resolve_labels(self, num_labels: int | None) -> tuple[int, list[str]]:
        feature = self.pool.features[self.label_column]
        if isinstance(feature, ClassLabel):
            if num_labels not in (None, feature.num_classes):
                raise ValueError(
                    f"num_labels is {num_labels}, but {self.label_column!r} has {feature.num_classes} classes: "
                    f"{feature.names}. Leave num_labels out, or cast the column."
                )
            return feature.num_classes, list(feature.names)
        if num_labels is None:
            largest = (
                self._labels.max() if self._test_labels is None else max(self._labels.max(), self._test_labels.max())
            )
            num_labels = int(largest) + 1
        return num_labels, [str(label) for label in range(num_labels)]

    def _warn_missing_classes(self) -> None:
        labels = self._split_labels("reserved")
        if labels is None:
            return
        missing = np.setdiff1d(np.arange(self.num_labels), labels)
        if len(missing):
            names = ", ".join(self.label_names[label] for label in missing)
            warnings.warn(
                f"The reserved set of {len(labels)} rows has no example of {len(missing)} of {self.num_labels} "
                f"classes: {names}. The gate cannot learn whom to trust on them. Raise reserved_size, keep "
                "stratify=True, or add examples of these classes.",
                stacklevel=3,
            )

    def _map_split(self, dataset: Dataset, labels: np.ndarray, name: str, function: Callable, kwargs: dict) -> Dataset:
        mapped = dataset.map(function, **kwargs)
        if len(mapped) != len(dataset):
            raise ValueError(
                f"map turned the {len(dataset)} rows of {name} into {len(mapped)}, so the partition no longer fits. "
                "The function must keep rows one to one; split long texts or filter before building the "
                "FederatedDataset."
            )
        if not np.array_equal(read_labels(mapped, self.label_column, f"the mapped {name}"), labels):
            raise ValueError(
                f"map changed {self.label_column!r} of {name}. Change labels before building the FederatedDataset."
            )
        return mapped
