"""Warnings in commands and recipes: ours in one line, none of libraries, which users can do nothing about."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def without_library_warnings(notes: bool = True) -> Iterator[None]:
    """
    Shows this package's warnings as notes of one line, in a block, and those of libraries not at all.

    Args:
        notes (`bool`, *optional*, defaults to `True`): Whether to show any. A block shows each once, but the next one
            would show it again.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if notes:
            warnings.filterwarnings("default", category=UserWarning, module="hf_fedmoe")
        warnings.showwarning = _note  # which `catch_warnings` puts back
        yield


def _note(message: Warning | str, *args: Any, **kwargs: Any) -> None:
    print(f"Note: {message}", flush=True)
