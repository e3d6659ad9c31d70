"""Tensors as rows: a model's state as one contiguous row, banks of rows, fusion, and what travels."""

from .fusion import collapse, fuse_, fuse_integers
from .layout import StateLayout, copy_module, release
from .payload import Payload, payload_fault


__all__ = ["Payload", "StateLayout", "collapse", "copy_module", "fuse_", "fuse_integers", "payload_fault", "release"]
