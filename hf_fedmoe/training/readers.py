"""The readers of rows in a run, and the name of a row that one of them cannot read."""

from collections.abc import Callable
from dataclasses import dataclass, field

import datasets
import numpy as np

from ..data import FederatedDataset
from ..data.row_checks import Fault, RowScan, scan_rows


# As many owners of faulty rows are named; those beyond are counted.
MAX_NAMED = 5


@dataclass
class Part:
    """
    Rows of one owner.

    Args:
        name (`str`): For example `"client 3"`.
        place (`str`): Where a user finds them, for example `"train_dataset.client(3)"`.
        rows (`np.ndarray`): Rows of the reader's dataset.
    """

    name: str
    place: str
    rows: np.ndarray


@dataclass
class Reader:
    """
    Rows that are read in one way.

    Args:
        dataset (`datasets.Dataset`): With the columns that the model takes.
        parts (`list[Part]`): Whose rows of it are read.
        collate (`Callable`): The data collator.
        collator (`str`): Its name as an argument.
        trains (`bool`): Whether models are trained on the rows, or only evaluated.
        scan ([`RowScan`]): What a pass over the dataset found.
    """

    dataset: datasets.Dataset
    parts: list[Part]
    collate: Callable
    collator: str
    trains: bool
    scan: RowScan = field(default_factory=lambda: RowScan(None, []))

    @property
    def rows(self) -> np.ndarray:
        """All rows that are read."""
        return np.concatenate([part.rows for part in self.parts])

    def length(self, row: int) -> int | None:
        """Tokens of a row, `None` if it is no text."""
        return None if self.scan.lengths_N is None else int(self.scan.lengths_N[row])

    def extremes(self) -> list[int]:
        """The shortest and the longest row, or the first two where all have one length; one twice if it is alone."""
        rows = self.rows
        if self.scan.lengths_N is not None:
            lengths = self.scan.lengths_N[rows]
            if lengths.min() < lengths.max():
                return [int(rows[lengths.argmin()]), int(rows[lengths.argmax()])]
        return [int(rows[0]), int(rows[min(1, len(rows) - 1)])]

    def name(self, row: int) -> str:
        """Calls a row that is read by its owner."""
        places = ((part, np.flatnonzero(part.rows == row)) for part in self.parts)
        part, (first, *_) = next((part, found) for part, found in places if len(found))
        return f"row {first} of {part.name} (`{part.place}[{first}]`)"

    def owners(self, rows: np.ndarray) -> list[str]:
        """Names those who have some of these rows."""
        return [part.name for part in self.parts if np.isin(part.rows, rows).any()]


def readers_of_run(
    data: FederatedDataset,
    columns: Callable[[datasets.Dataset], datasets.Dataset],
    train_collate: Callable,
    collate: Callable,
    evaluated: dict[str, datasets.Dataset],
    with_reserved: bool,
    client_name: Callable[[int], str],
) -> list[Reader]:
    """
    Lists who reads what in a run.

    Args:
        data ([`~data.FederatedDataset`]): The run's.
        columns (`Callable`): Leaves a dataset the columns that the model takes.
        train_collate (`Callable`), collate (`Callable`): The collators of training and evaluation.
        evaluated (`dict[str, datasets.Dataset]`): What is evaluated on, by where a user finds it.
        with_reserved (`bool`): Whether the server reads the reserved set.
        client_name (`Callable`): From a client's number to what messages call it.
    """
    pool = columns(data.pool)
    own = [*data.client_indices, *data.unseen_indices]
    clients = [Part(client_name(client), f"train_dataset.client({client})", rows) for client, rows in enumerate(own)]
    readers = [Reader(pool, clients, train_collate, "train_data_collator", trains=True)]
    if with_reserved:
        part = Part("the reserved set", "train_dataset.reserved", data.split_indices["reserved"])
        readers.append(Reader(pool, [part], train_collate, "train_data_collator", trains=True))
    if data.client_test_indices:
        tests = [
            Part(f"the test of {client_name(client)}", f"train_dataset.client_test({client})", rows)
            for client, rows in enumerate(data.client_test_indices)
        ]
        readers.append(Reader(pool, tests, collate, "data_collator", trains=False))
    if data.test is not None:
        evaluated = evaluated | {"train_dataset.test": data.test}
    for place, dataset in evaluated.items():
        part = Part(f"`{place}`", place, np.arange(len(dataset)))
        readers.append(Reader(columns(dataset), [part], collate, "data_collator", trains=False))
    return readers


def scan_readers(readers: list[Reader], num_embeddings: int | None, num_labels: int) -> list[str]:
    """
    Looks at the rows of every reader, at each dataset once, and says what cannot be read.

    Args:
        readers (`list[Reader]`): Each gets its `scan`.
        num_embeddings (`int`, *optional*): Tokens that the model knows.
        num_labels (`int`): Classes that it knows.

    Returns:
        `list[str]`: A sentence for each kind of fault, none if all can be read.
    """
    by_dataset: dict[int, list[Reader]] = {}
    for reader in readers:
        by_dataset.setdefault(id(reader.dataset), []).append(reader)
    sentences: list[str] = []
    for group in by_dataset.values():
        dataset = group[0].dataset
        if dataset.format["type"] == "custom":
            continue  # what is stored is not what the collator gets
        scan = scan_rows(dataset, num_embeddings, num_labels)
        for reader in group:
            reader.scan = scan
        sentences += filter(None, (fault_sentence(fault, group) for fault in scan.faults))
    return sentences


def fault_sentence(fault: Fault, readers: list[Reader]) -> str | None:
    """Says which rows have a fault, and what to do; `None` if nobody reads them."""
    found, values = np.array(fault.rows), np.array(fault.values)
    read = [np.isin(found, reader.rows) for reader in readers]
    reader = next((reader for reader, own in zip(readers, read, strict=True) if own.any()), None)
    if reader is None:
        return None
    # Of the first owner the first row, which is where somebody looks.
    part = next(part for part in reader.parts if np.isin(found, part.rows).any())
    first = int(part.rows[np.isin(part.rows, found)][0])
    value = values[found == first][0]
    count = int(np.any(read, axis=0).sum())
    sentence = f"`{fault.column}` of {reader.name(first)} {fault.problem.format(value=value)}"
    if count > 1:
        owners = list(dict.fromkeys(name for reader in readers for name in reader.owners(found)))
        named = ", ".join(owners[:MAX_NAMED])
        more = f" and {len(owners) - MAX_NAMED} more" if len(owners) > MAX_NAMED else ""
        sentence += f"; so it is with {count} rows, of {named}{more}"
    return f"{sentence}: {fault.remedy}."
