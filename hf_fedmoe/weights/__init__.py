"""Tensors as rows: a model's state as one contiguous row, banks of rows, fusion, and what travels."""

from .compression import COMPRESSIONS, Codec, compress_upload, make_codec
from .fusion import collapse, fuse_, fuse_integers
from .layout import Slot, StateLayout, copy_module, release
from .lora_rows import bytes_at_rank, fit_rank_, fuse_models_, mix_rows
from .payload import Payload, keep_private_, payload_fault


__all__ = [
    "COMPRESSIONS",
    "Codec",
    "Payload",
    "Slot",
    "StateLayout",
    "bytes_at_rank",
    "collapse",
    "compress_upload",
    "copy_module",
    "fit_rank_",
    "fuse_",
    "fuse_integers",
    "fuse_models_",
    "keep_private_",
    "make_codec",
    "mix_rows",
    "payload_fault",
    "release",
]
