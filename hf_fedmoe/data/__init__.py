"""Partitions, the federated dataset, and where data comes from."""

from .client_tests import hold_out_client_tests
from .federated_dataset import FederatedDataset, Partitioner
from .images import (
    AUGMENTATIONS,
    ImageCollator,
    cutout,
    decode_images,
    random_crop,
    random_flip,
    random_resized_crop,
)
from .label_group_partitions import pachinko
from .partitions import dirichlet, hold_out, hold_out_ids, iid, natural, predominant, shards
from .reserved_set import ReservedSet
from .sources import load_source


__all__ = [
    "AUGMENTATIONS",
    "FederatedDataset",
    "ImageCollator",
    "Partitioner",
    "ReservedSet",
    "cutout",
    "decode_images",
    "dirichlet",
    "hold_out",
    "hold_out_client_tests",
    "hold_out_ids",
    "iid",
    "load_source",
    "natural",
    "pachinko",
    "predominant",
    "random_crop",
    "random_flip",
    "random_resized_crop",
    "shards",
]
