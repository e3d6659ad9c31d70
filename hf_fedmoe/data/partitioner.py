"""Flower's partitioners, as far as they are needed here."""

from typing import Protocol

from datasets import Dataset


class Partitioner(Protocol):
    """A partitioner as [`FederatedDataset.from_partitioner`] needs it; those of `flwr_datasets` are such."""

    dataset: Dataset

    @property
    def num_partitions(self) -> int: ...

    def load_partition(self, partition_id: int) -> Dataset: ...
