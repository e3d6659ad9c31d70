"""Experiments whose clients are in groups, to each of which inputs look different or mean something else."""

from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np

from ..data import DOMAIN_COLUMN, SHIFTS, FederatedDataset, domains, joined, with_domains
from .classifier_experiment import ClassifierExperiment


# That a shift makes, unless another number is asked for.
NUM_DOMAINS = 4


@dataclass
class DomainExperiment(ClassifierExperiment):
    """
    Classification with a partition by domains: those of the data, or made by a shift.

    Several data sets with `+` between their names are one, of which each is a domain: `characters+digits`.
    """

    num_domains: int | None = field(
        default=None,
        metadata={"help": "Groups of clients, for partition domains (those of a column `domain` of the data, or 4)."},
    )
    domain_shift: str = field(
        default="labels", metadata={"help": f"What differs between domains: {', '.join(SHIFTS)}."}
    )

    partitions = (*ClassifierExperiment.partitions, "domains")
    lowest = {**ClassifierExperiment.lowest, "num_domains": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.domain_shift not in SHIFTS:
            raise ValueError(f"`domain_shift` is {self.domain_shift!r}: choose one of {', '.join(SHIFTS)}.")

    def load(self, name: str) -> datasets.DatasetDict:
        names = [name] if Path(name).exists() else [part.strip() for part in name.split("+")]
        if not all(names) or len(set(names)) < len(names):
            raise ValueError(f"`dataset` has {name!r}: name each data set that is joined to others once.")
        sources = {part: super(DomainExperiment, self).load(part) for part in names}
        return joined(sources) if len(names) > 1 else sources[name]

    def split(self, source: datasets.DatasetDict, seed: int) -> FederatedDataset:
        return super().split(self._with_domains(source, seed) if self.partition == "domains" else source, seed)

    def _with_domains(self, source: datasets.DatasetDict, seed: int) -> datasets.DatasetDict:
        """Rows of domains: those of the data, or of this shift, of as few rows as are needed."""
        if DOMAIN_COLUMN in source["train"].column_names:
            found = len(source["train"].unique(DOMAIN_COLUMN))
            if self.num_domains not in (None, found):
                raise ValueError(
                    f"`num_domains` is {self.num_domains}, but the data has a column {DOMAIN_COLUMN!r} of {found}, "
                    f"which are taken as they are: give {found}, or leave that column out."
                )
            return source
        needed = self.num_clients * self.examples_per_client + self.reserved_size + self.validation_size
        train = source["train"].shuffle(seed=seed)
        # A tenth more, since domains have equally many rows only as long as nobody holds any out.
        train = train.select(range(min(len(train), self.max_train_examples or round(1.1 * needed))))
        test = source["test"].shuffle(seed=0).select(range(min(self.max_test_examples, len(source["test"]))))
        splits = {"train": train, "test": test}
        return datasets.DatasetDict(
            {
                split: with_domains(rows, self.num_domains or NUM_DOMAINS, self.domain_shift)
                for split, rows in splits.items()
            }
        )

    def divide(self, rows: datasets.Dataset, seed: int) -> list[np.ndarray]:
        if self.partition == "domains":
            return domains(rows[DOMAIN_COLUMN], self.num_clients, seed, self.examples_per_client)
        return super().divide(rows, seed)
