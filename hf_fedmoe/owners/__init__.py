"""Owners of text who pool nothing: an expert each, trained alone, the mixture of them, and one without an owner."""

from ..data import pack
from .merge import merge_experts, remove_owner
from .privacy import private_statistics
from .texts import read_rows, read_texts
from .train import ExpertFacts, default_arguments, fit_adapter, load_base, new_adapter, train_expert


__all__ = [
    "ExpertFacts",
    "default_arguments",
    "fit_adapter",
    "load_base",
    "merge_experts",
    "new_adapter",
    "pack",
    "private_statistics",
    "read_rows",
    "read_texts",
    "remove_owner",
    "train_expert",
]
