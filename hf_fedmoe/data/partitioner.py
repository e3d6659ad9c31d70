"""Flower's partitioners, as far as they are needed here."""

from typing import Protocol

from datasets import Dataset


class Partitioner(Protocol):
    """What [`FederatedDataset.from_partitioner`] needs of a partitioner; those of `flwr_datasets` have it."""

    dataset: Dataset

    @property
    def num_partitions(self) -> int: ...

    def load_partition(self, partition_id: int) -> Dataset: ...
