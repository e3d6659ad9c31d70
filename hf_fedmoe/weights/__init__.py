"""Tensors as rows: a model's state as one contiguous row, banks of rows, fusion, and what travels."""

from .compression import COMPRESSIONS, Codec, compress_upload, encoded_names, make_codec, read_upload_
from .fusion import add_to_sum_, collapse, fuse_, fuse_integers, mean_of_sum_
from .layout import Slot, StateLayout, copy_module, in_one_copy, release
from .lora_rows import fit_rank_, fuse_models_, mix_rows, sizes_at_rank, widen_rank_
from .payload import Payload, all_finite, keep_private_, negative_variance, payload_fault
from .reducers import Reducer, by_entries, fuse_geometric_median_, median, trimmed_mean
from .sub_models import (
    average_held_,
    fold_scales_,
    narrow_config,
    narrow_layout,
    narrow_model,
    put_held_,
    sub_places,
    take_held,
)


__all__ = [
    "COMPRESSIONS",
    "Codec",
    "Payload",
    "Reducer",
    "Slot",
    "StateLayout",
    "add_to_sum_",
    "all_finite",
    "average_held_",
    "by_entries",
    "collapse",
    "compress_upload",
    "copy_module",
    "encoded_names",
    "fit_rank_",
    "fold_scales_",
    "fuse_",
    "fuse_geometric_median_",
    "fuse_integers",
    "fuse_models_",
    "in_one_copy",
    "keep_private_",
    "make_codec",
    "mean_of_sum_",
    "median",
    "mix_rows",
    "narrow_config",
    "narrow_layout",
    "narrow_model",
    "negative_variance",
    "payload_fault",
    "put_held_",
    "read_upload_",
    "release",
    "sizes_at_rank",
    "sub_places",
    "take_held",
    "trimmed_mean",
    "widen_rank_",
]
