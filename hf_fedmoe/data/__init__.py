"""Partitions, the federated dataset, and where data comes from."""

from .federated_dataset import FederatedDataset, Partitioner
from .partitions import dirichlet, hold_out, iid, natural, predominant, shards
from .reserved_set import ReservedSet
from .sources import load_source


__all__ = [
    "FederatedDataset",
    "Partitioner",
    "ReservedSet",
    "dirichlet",
    "hold_out",
    "iid",
    "load_source",
    "natural",
    "predominant",
    "shards",
]
