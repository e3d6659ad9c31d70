"""The data of a federation: clients and the server's splits, all as row indices into one pool."""

import copy
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset

from .client_names import check_client_names, names_and_parts, place_of_name
from .common_features import check_clients, check_dataset, one_table
from .counted import counted
from .division import Partition, divide
from .fingerprint import partition_fingerprint
from .label_distribution import MAX_TABLE_CLIENTS, clients_table, count_labels, plot_labels
from .label_maps import with_label_map, with_one_label_map
from .labels import check_label_column, check_label_range, holds_names, read_labels, resolve_classes
from .own_files import read_own_files
from .own_folders import read_own_folders
from .own_paths import OwnPath, files_and_sizes
from .partitioner import Partitioner
from .row_by_row import map_rows
from .server_splits import split_off
from .split_checks import check_indices, warn_classes, warn_equal_rows


class FederatedDataset:
    """
    Clients and server-side splits over one pool of rows.

    Rows are never copied: each client and each split is a list of row indices, and reading it is a `Dataset.select`.
    Everything that could spoil a run is checked here, before any training. Use [`~FederatedDataset.split`] to divide
    one dataset, [`~FederatedDataset.from_files`], `from_folders` and `from_clients` to bring your own clients, and the
    constructor when you have the indices.

    Args:
        pool (`datasets.Dataset`): All rows.
        client_indices (`Sequence[np.ndarray]` or `Mapping[str, np.ndarray]`): Rows of each of the M clients, by their
            names if they have some.
        reserved (`np.ndarray`, *optional*): Rows of the server's reserved set, on which the gate is fitted.
        validation (`np.ndarray`, *optional*): Rows for choosing between checkpoints.
        test (`np.ndarray` or `datasets.Dataset`, *optional*): Rows of the pool, or a dataset of its own with the same
            label column. Names of its classes are matched with the pool's.
        label_column (`str`, *optional*, defaults to `"label"`): Column of labels: a `datasets.ClassLabel`, integers
            from 0, or strings or booleans, which become a `ClassLabel` in sorted order.
        num_labels (`int`, *optional*): Number of classes C. By default that of the `ClassLabel`, or else the largest
            label plus one.
        unseen_clients (`Sequence[np.ndarray]` or `Mapping[str, np.ndarray]`, *optional*): Rows of U further clients
            that take part in no round. They have the numbers M to M + U - 1.
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
        has_label_names (`bool`): Whether the data names its classes; `label_names` are their numbers otherwise.
        given_client_names (`list[str]`, *optional*): Names of the M + U clients, `None` where none were given.

    Raises:
        ValueError: When there are no clients, an empty client or split, rows in two splits, a missing label column,
            labels that are not integers in `[0, num_labels)`, integers that do not count from 0 (stars from 1 to 5)
            with no `num_labels`, or two clients of one name.

    Warns:
        UserWarning: When a class has no row, the reserved set lacks one, only validation or test have one, or a
            separate test set repeats rows of the pool.
    """

    # Whether rows have classes, of which labels are the numbers, and what reads them; [`FederatedTexts`] has none.
    has_classes = True
    _read_labels, _resolve_classes = staticmethod(read_labels), staticmethod(resolve_classes)

    def __init__(
        self,
        pool: Dataset,
        client_indices: Partition,
        reserved: np.ndarray | None = None,
        validation: np.ndarray | None = None,
        test: np.ndarray | Dataset | None = None,
        label_column: str = "label",
        num_labels: int | None = None,
        unseen_clients: Partition = (),
        client_tests: Sequence[np.ndarray] = (),
    ):
        check_dataset(pool, "pool")
        if len(client_indices) == 0:
            raise ValueError("client_indices is empty: there are no clients. Give at least one array of rows.")
        client_names, clients = names_and_parts(client_indices)
        unseen_names, unseen = names_and_parts(unseen_clients, start=len(clients))
        together = len(clients) + len(unseen)
        if len(client_tests) not in (0, together):
            raise ValueError(
                f"client_tests has {len(client_tests)} entries for {together} clients, unseen ones included: give one "
                "array of test rows for each."
            )
        names = check_client_names([*client_names, *unseen_names])
        named = {f"client {name}": rows for name, rows in zip(client_names, clients, strict=True)}
        own_test = {"test": test} if isinstance(test, Dataset) else {}
        given = {"reserved": reserved, "validation": validation, "test": None if own_test else test}
        named |= {name: rows for name, rows in given.items() if rows is not None}
        named |= {f"unseen client {name}": rows for name, rows in zip(unseen_names, unseen, strict=True)}
        named |= {f"test of client {name}": rows for name, rows in zip(names, client_tests, strict=False)}
        arrays = check_indices(named, len(pool))
        if own_test:
            check_dataset(test, "test")
        labelled = with_one_label_map({"pool": pool}, own_test, label_column)

        self.pool = labelled["pool"]
        self.client_indices = [arrays[f"client {name}"] for name in client_names]
        self.split_indices = {name: arrays[name] for name in given if name in arrays}
        self.unseen_indices = [arrays[f"unseen client {name}"] for name in unseen_names]
        self.client_test_indices = [arrays[f"test of client {name}"] for name in names[: len(client_tests)]]
        have_names = isinstance(client_indices, Mapping) or isinstance(unseen_clients, Mapping)
        self.given_client_names = names if have_names else None
        self.label_column = label_column
        self._test = labelled.get("test")
        every = {name: self._read_labels(dataset, label_column, name) for name, dataset in labelled.items()}
        self._labels, self._test_labels = every["pool"], every.get("test")

        feature = self.pool.features[label_column]
        self.has_label_names = isinstance(feature, ClassLabel)
        self.num_labels, self.label_names = self._resolve_classes(feature, every, num_labels, label_column)
        for name, labels in every.items():
            check_label_range(labels, self.num_labels, label_column, name)
        if self._test is not None:
            rows = pool.select(np.concatenate(self.client_indices))
            splits = {"clients": rows, **{name: pool.select(rows) for name, rows in self.split_indices.items()}}
            warn_equal_rows({**splits, "test": self._test}, label_column, against="test")
        trained = self._labels[np.concatenate(self.client_indices)]
        warn_classes(trained, self._labels_of_splits(), self.label_names)

    @classmethod
    def split(
        cls,
        dataset: Dataset,
        partition: Callable[[Dataset], Partition],
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
            partition (`Callable[[Dataset], Sequence[np.ndarray] | Mapping[str, np.ndarray]]`): Called with the
                remaining rows; returns indices into them, for example
                `lambda rows: dirichlet(rows["label"], num_clients=10, alpha=0.3)`, by the names of the clients if
                they have some ([`natural_by_name`]). Rows that it gives to nobody are dropped.
            reserved_size (`int` or `float`, *optional*, defaults to 0): Rows of the reserved set, or their share of
                `dataset`.
            validation_size (`int` or `float`, *optional*, defaults to 0): The same for validation.
            test (`Dataset`, `int` or `float`, *optional*): A test set of its own, or how much of `dataset` to hold out
                for it.
            seed (`int`, *optional*, defaults to 0): Seed of the hold-outs. The partition has its own.
            label_column (`str`, *optional*, defaults to `"label"`): Column of labels.
            num_labels (`int`, *optional*): Number of classes, when the column holds integers without names.
            stratify (`bool`, *optional*, defaults to `True`): Whether held-out splits keep the proportions of classes,
                with at least one row of each class where their size allows. `False` draws uniformly from all rows.
            reserved_share (`float`, *optional*): Share of one class, drawn at random, in the reserved set, whatever
                `stratify` says; see [`hold_out_predominant`].

        Returns:
            [`FederatedDataset`]: With `pool` the rows of `dataset` that somebody has, in their order there.
        """
        sizes = dict(reserved=reserved_size, validation=validation_size)
        settings = seed, label_column, num_labels, stratify, reserved_share, cls._read_labels, cls._resolve_classes
        return cls(**divide(dataset, partition, sizes, test, *settings), label_column=label_column)

    @classmethod
    def from_clients(
        cls,
        clients: Sequence[Dataset] | Mapping[str, Dataset],
        reserved: Dataset | None = None,
        validation: Dataset | None = None,
        test: Dataset | None = None,
        label_column: str = "label",
        num_labels: int | None = None,
    ) -> "FederatedDataset":
        """
        Takes clients as they are, one dataset each. The pool is their concatenation, which copies no rows but those
        of datasets whose labels are renumbered or whose columns are cast.

        Classes are the same when their names are: where label maps differ in order or coverage, or labels are strings,
        all get one map. It is that of the clients if one has all names, and else sorted. Integers without names are
        left as they are. Types of columns that differ in width only are cast to the widest.

        Args:
            clients (`Sequence[datasets.Dataset]` or `Mapping[str, datasets.Dataset]`): M datasets with the same
                columns, by their names if they have some.
            reserved (`datasets.Dataset`, *optional*): The server's reserved set, with the same columns.
            validation (`datasets.Dataset`, *optional*): Validation set, with the same columns.
            test (`datasets.Dataset`, *optional*): Test set; only its labels must agree.
            label_column (`str`, *optional*, defaults to `"label"`): Column of labels.
            num_labels (`int`, *optional*): Number of classes, when the column holds integers without names.

        Returns:
            [`FederatedDataset`]

        Raises:
            ValueError: When there are no clients, one is empty or no `Dataset`, columns or their types differ, or some
                have names of classes and others have not.

        Warns:
            UserWarning: When clients, reserved, validation and test have rows of equal content.
        """
        names, parts = names_and_parts(check_clients(clients))
        by_name = {f"client {name}": dataset for name, dataset in zip(names, parts, strict=True)}
        given = {"reserved": reserved, "validation": validation, "test": test}
        given = {name: dataset for name, dataset in given.items() if dataset is not None}
        for name, dataset in {**by_name, **given}.items():
            check_dataset(dataset, name)
        labelled = with_one_label_map(by_name, given, label_column)
        test = labelled.pop("test", None)
        pool, rows = one_table(labelled)
        server = {name: rows[name] for name in ("reserved", "validation") if name in rows}
        if server:
            client_rows = pool.select(range(sum(len(dataset) for dataset in parts)))
            warn_equal_rows(
                {"clients": client_rows, **{name: pool.select(held) for name, held in server.items()}}, label_column
            )
        named = {name: rows[f"client {name}"] for name in names}
        divided: Partition = named if isinstance(clients, Mapping) else list(named.values())
        return cls(pool, divided, server.get("reserved"), server.get("validation"), test, label_column, num_labels)

    @classmethod
    def from_files(
        cls,
        clients: Mapping[str, OwnPath] | Sequence[OwnPath],
        text: str,
        label: str,
        reserved: OwnPath | int | float | None = None,
        test: OwnPath | int | float | None = None,
        validation: OwnPath | int | float | None = None,
        classes: Sequence[str] | None = None,
        seed: int = 0,
    ) -> "FederatedDataset":
        """
        Reads labelled texts from a file of each client, as columns `text` and `label`; other columns are left out.

        Args:
            clients (`Mapping[str, str]` or `Sequence[str]`): A `.csv`, `.jsonl`, `.json` or `.parquet` of each client
                by its name, or in a list, where files name clients: `"north.csv"` is north.
            text (`str`), label (`str`): Columns of the texts, and of the labels: words or whole numbers.
            reserved, test, validation (`str`, `int` or `float`, *optional*): A file of the server's own, or how many
                rows, or what share of all, are split off the clients' for it, classes in proportion.
            classes (`Sequence[str]`, *optional*): All classes in their order. By default those that occur in any
                file, numbers by their value and words in natural order.
            seed (`int`, *optional*, defaults to 0): Of what is split off.

        Raises:
            ValueError: Names the file, the column, the row and the remedy.
        """
        others, sizes = files_and_sizes(reserved=reserved, validation=validation, test=test)
        given, splits = read_own_files(clients, others, text, label, classes)
        kept, drawn = split_off(given, sizes, seed)
        return cls.from_clients(kept, **splits, **drawn)

    @classmethod
    def from_folders(
        cls,
        clients: Mapping[str, OwnPath] | Sequence[OwnPath],
        reserved: OwnPath | int | float | None = None,
        test: OwnPath | int | float | None = None,
        validation: OwnPath | int | float | None = None,
        classes: Sequence[str] | None = None,
        seed: int = 0,
    ) -> "FederatedDataset":
        """
        Takes images, as columns `image` and `label`, from a folder of each client with a subfolder for every class.

        Args:
            clients (`Mapping[str, str]` or `Sequence[str]`): Folders by the names of the clients, or a list of them.
            reserved, test, validation, classes, seed (*optional*): As in [`~FederatedDataset.from_files`], folders
                in the place of files. So are the errors.
        """
        others, sizes = files_and_sizes(reserved=reserved, validation=validation, test=test)
        given, splits = read_own_folders(clients, others, classes)
        kept, drawn = split_off(given, sizes, seed)
        return cls.from_clients(kept, **splits, **drawn)

    @classmethod
    def from_partitioner(
        cls,
        partitioner: Partitioner,
        reserved: Dataset | None = None,
        validation: Dataset | None = None,
        test: Dataset | None = None,
        label_column: str = "label",
        num_labels: int | None = None,
        client_names: Iterable[str] | None = None,
    ) -> "FederatedDataset":
        """
        Takes clients from a Flower partitioner, or any object with `dataset`, `num_partitions`, `load_partition(i)`.

        A partitioner divides all rows of its dataset, so hold out reserved, validation and test before you set
        `partitioner.dataset`.

        Args:
            partitioner ([`Partitioner`]): With its `dataset` set.
            reserved, validation, test, label_column, num_labels: See [`~FederatedDataset.from_clients`].
            client_names (`Iterable[str]`, *optional*): Names of the partitions in their order, for example
                `partitioner.partition_id_to_natural_id.values()` of Flower's `NaturalIdPartitioner`.

        Returns:
            [`FederatedDataset`]
        """
        parts = [partitioner.load_partition(i) for i in range(partitioner.num_partitions)]
        clients: Sequence[Dataset] | Mapping[str, Dataset] = parts
        if client_names is not None:
            names = check_client_names(client_names)
            if len(names) != len(parts):
                raise ValueError(f"client_names has {len(names)} names for {len(parts)} partitions: name each.")
            clients = dict(zip(names, parts, strict=True))
        return cls.from_clients(clients, reserved, validation, test, label_column, num_labels)

    @property
    def num_clients(self) -> int:
        """Number of clients M."""
        return len(self.client_indices)

    @property
    def client_names(self) -> list[str]:
        """Names of the M + U clients, unseen ones last: those given, or else their numbers."""
        count = self.num_clients + len(self.unseen_indices)
        return [str(client) for client in range(count)] if self.given_client_names is None else self.given_client_names

    def client_name(self, client: int) -> str:
        """The name of a client, which is its number where no names were given."""
        return str(client) if self.given_client_names is None else self.given_client_names[client]

    def client_number(self, client: int | str) -> int:
        """
        The number of a client.

        Args:
            client (`int` or `str`): Its number, from 0 to `num_clients - 1` and then the unseen clients, or its name.

        Raises:
            IndexError: When there is no client of this number.
            KeyError: When there is none of this name.
        """
        if isinstance(client, str):
            return place_of_name(client, self.client_names)
        count = self.num_clients + len(self.unseen_indices)
        if not 0 <= client < count:
            raise IndexError(f"client {client} does not exist: there are {count} clients, 0 to {count - 1}.")
        return operator.index(client)

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

    def client(self, client: int | str) -> Dataset:
        """The rows of one client, given by number or name, as a view of the pool."""
        return self.pool.select(self.client_rows(client))

    def client_rows(self, client: int | str) -> np.ndarray:
        """The rows of the pool that a client, seen or unseen, trains on."""
        number = self.client_number(client)
        unseen = number - self.num_clients
        return self.client_indices[number] if unseen < 0 else self.unseen_indices[unseen]

    def client_test(self, client: int | str) -> Dataset:
        """
        The test rows of one client, given by number or name, as a view of the pool.

        Raises:
            ValueError: When clients have no test rows.
        """
        if not self.client_test_indices:
            raise ValueError(
                "client_tests is empty: clients have no test rows of their own. Hold some out, "
                "`hold_out_client_tests(data, test_share=0.2)`."
            )
        return self.pool.select(self.client_test_indices[self.client_number(client)])

    def align_labels(self, dataset: Dataset, name: str) -> Dataset:
        """
        Numbers the labels of another dataset as those of the clients, by the names of the classes.

        Args:
            dataset (`datasets.Dataset`): Returned as it is when its labels are integers without names, or those of the
                clients are.
            name (`str`): Name of the dataset in messages.

        Raises:
            ValueError: When the label column is missing or has a class that the clients' data do not have.
        """
        check_label_column(dataset, self.label_column, name)
        feature = dataset.features[self.label_column]
        if not holds_names(feature) or (isinstance(feature, ClassLabel) and not self.has_label_names):
            return dataset
        return with_label_map(dataset, self.label_column, self.label_names, name)

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
        settings = function, kwargs, self._read_labels
        result.pool = map_rows(self.pool, self._labels, self.label_column, "pool", *settings)
        if self._test is not None and self._test_labels is not None:
            result._test = map_rows(self._test, self._test_labels, self.label_column, "test", *settings)
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
        shown = [f"client {self.client_name(i)}" for i in range(min(self.num_clients, MAX_TABLE_CLIENTS))]
        table = clients_table(shown, self.label_counts(), self._labels_of_splits(), self.label_names)
        sizes = self.client_sizes
        title = f"{counted(self.num_clients, 'client')} with {counted(int(sizes.sum()), 'row')} "
        title += f"({sizes.min()} to {sizes.max()} each), {self.num_labels} classes"
        tests, unseen = sum(map(len, self.client_test_indices)), len(self.unseen_indices)
        title += f"; {counted(tests, 'test row')} of the clients' own" if tests else ""
        title += f"; {counted(unseen, 'unseen client')}" if unseen else ""
        return f"{title}\n{table}"

    def plot(self, path: str | os.PathLike) -> None:
        """
        Writes a picture of the clients: one bar each, stacked by class, with their names if they have some.

        Args:
            path (`str` or `os.PathLike`): Image file; its suffix is the format.
        """
        plot_labels(self.label_counts(), self.label_names, path, self.given_client_names)

    def state_fingerprint(self) -> str:
        """
        A short hash of the partition and the labels, equal before and after [`~FederatedDataset.map`].

        A checkpoint keeps it, so that a run is not resumed on other data.

        Returns:
            `str`: 16 hexadecimal digits.
        """
        named = {f"client {i}": rows for i, rows in enumerate(self.client_indices)} | self.split_indices
        named |= {f"unseen {i}": rows for i, rows in enumerate(self.unseen_indices)}
        named |= {f"client test {i}": rows for i, rows in enumerate(self.client_test_indices)}
        return partition_fingerprint(self.num_labels, self._labels, named, self._test_labels)

    def __repr__(self) -> str:
        return (
            f"FederatedDataset(num_clients={self.num_clients}, num_labels={self.num_labels}, "
            f"splits={list(self._labels_of_splits())}, pool={len(self.pool)} rows)"
        )

    def _select(self, name: str) -> Dataset | None:
        return self.pool.select(self.split_indices[name]) if name in self.split_indices else None

    def _labels_of_splits(self) -> dict[str, np.ndarray]:
        own_test = {} if self._test_labels is None else {"test": self._test_labels}
        return {name: self._labels[rows] for name, rows in self.split_indices.items()} | own_test
