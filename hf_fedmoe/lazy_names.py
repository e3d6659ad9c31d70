"""Names of a package that are imported when they are asked for."""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any


def lazy_names(package: str, modules: dict[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """
    Makes the `__getattr__` and the `__dir__` of a package (PEP 562).

    Args:
        package (`str`): Its `__name__`.
        modules (`dict[str, str]`): The module of the package that each name is of, imported with the first of them.
    """

    def get_attribute(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f".{modules[name]}", package), name)
        setattr(sys.modules[package], name, value)  # asked once
        return value

    def list_names() -> list[str]:
        return sorted(vars(sys.modules[package]) | modules)

    return get_attribute, list_names
