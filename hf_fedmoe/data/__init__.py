"""Partitions, the federated dataset, and where data comes from."""

from .batches import has_batch_statistics, split_rows
from .characters import (
    CHARACTER_NAMES,
    CHARACTERS,
    character_inputs,
    decode_characters,
    encode_characters,
    next_character_windows,
)
from .client_tests import hold_out_client_tests
from .domains import DOMAIN_COLUMN, SHIFTS, domains, joined, with_domains
from .federated_dataset import FederatedDataset
from .federated_texts import FederatedTexts
from .fingerprint import rows_fingerprint
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
from .partitioner import Partitioner
from .partitions import (
    dirichlet,
    hold_out,
    hold_out_ids,
    hold_out_predominant,
    iid,
    natural,
    natural_by_name,
    predominant,
    shards,
)
from .reserved_set import ReservedSet
from .shortening import with_fewer_rows
from .sources import load_named_classes, load_rows, load_source
from .synthetic_mixture import SyntheticMixture, synthetic_mixture
from .token_rows import pack, token_rows


__all__ = [
    "AUGMENTATIONS",
    "CHARACTERS",
    "CHARACTER_NAMES",
    "DOMAIN_COLUMN",
    "SHIFTS",
    "FederatedDataset",
    "FederatedTexts",
    "ImageCollator",
    "Partitioner",
    "ReservedSet",
    "SyntheticMixture",
    "character_inputs",
    "cutout",
    "decode_characters",
    "decode_images",
    "dirichlet",
    "domains",
    "encode_characters",
    "has_batch_statistics",
    "hold_out",
    "hold_out_client_tests",
    "hold_out_ids",
    "hold_out_predominant",
    "iid",
    "joined",
    "load_named_classes",
    "load_rows",
    "load_source",
    "natural",
    "natural_by_name",
    "next_character_windows",
    "pachinko",
    "pack",
    "predominant",
    "random_crop",
    "random_flip",
    "random_resized_crop",
    "rows_fingerprint",
    "shards",
    "split_rows",
    "synthetic_mixture",
    "token_rows",
    "with_domains",
    "with_fewer_rows",
]
