"""Experiments from settings: recipes, and comparisons of methods over seeds."""

from importlib import import_module
from typing import Any


# What each name is of. A module is imported with the first of its names: a process of `side_by_side` is there at once,
# and imports what its tasks need.
_MODULES = {
    "METHODS": "methods",
    "CharacterExperiment": "characters",
    "Experiment": "experiment",
    "FailedRunsError": "run_comparison",
    "ImageExperiment": "images",
    "TextExperiment": "texts",
    "compare": "run_comparison",
    "find_model": "experiment",
    "main": "recipe",
    "make_trainer": "methods",
    "parse": "recipe",
    "parse_settings": "settings",
    "read_preset": "settings",
    "read_words": "settings",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value  # asked once
    return value


def __dir__() -> list[str]:
    return sorted(globals() | _MODULES)
