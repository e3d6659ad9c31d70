"""Tensors as rows: a model's state as one contiguous row, banks of rows, fusion, and what travels."""

from .compression import COMPRESSIONS, Codec, compress_upload, make_codec
from .fusion import collapse, fuse_, fuse_integers
from .layout import StateLayout, copy_module, release
from .payload import Payload, keep_private_, payload_fault


__all__ = [
    "COMPRESSIONS",
    "Codec",
    "Payload",
    "StateLayout",
    "collapse",
    "compress_upload",
    "copy_module",
    "fuse_",
    "fuse_integers",
    "keep_private_",
    "make_codec",
    "payload_fault",
    "release",
]
