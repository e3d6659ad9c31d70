"""Settings are of the kind that their annotation says: checked for all, before anything is compared with them."""

import math
import numbers
import typing
from functools import cache
from types import NoneType, UnionType
from typing import Any


# What a field is annotated with, what its value has to be, and what a message calls that.
KINDS = {int: (numbers.Integral, "a whole number"), float: (numbers.Real, "a number")}


def check_setting_kinds(settings: Any) -> None:
    """
    Checks the numbers and switches of a dataclass, by the annotations of its fields.

    Args:
        settings: Its fields of `int`, `float` or `bool` are looked at, and those that may be `None` besides.

    Raises:
        ValueError: When a number is none, a switch, or has a fraction that it must not have, or when a switch is a
            text, which would be on whatever it says.
    """
    for name, (kind, optional) in _kinds(type(settings)).items():  # type: ignore[arg-type]  # a class has a hash
        value = vars(settings).get(name)
        if value is None:
            if optional or name not in vars(settings):
                continue
            raise ValueError(f"`{name}` is None: give {_called(kind)}, or leave it out.")
        if kind is bool:
            if isinstance(value, str):
                raise ValueError(f"`{name}` is {value!r}, a text: give {_called(kind)}.")
        elif isinstance(value, bool) or not isinstance(value, KINDS[kind][0]) or math.isnan(value):
            raise ValueError(f"`{name}` is {value!r}: give {_called(kind)}.")


def _called(kind: type) -> str:
    return "True or False" if kind is bool else KINDS[kind][1]


@cache
def _kinds(settings_class: type) -> dict[str, tuple[type, bool]]:
    """Returns `int`, `float` or `bool` by the names of such fields, and whether they may be `None`."""
    try:
        hints = typing.get_type_hints(settings_class)
    except NameError:  # of somebody's class, with a name that is imported for type checkers only
        return {}
    found = {}
    for name, hint in hints.items():
        is_union = isinstance(hint, UnionType) or typing.get_origin(hint) is typing.Union
        choices = typing.get_args(hint) if is_union else ()
        kinds = [choice for choice in choices or (hint,) if choice is not NoneType]
        if len(kinds) == 1 and kinds[0] in (int, float, bool):
            found[name] = (kinds[0], NoneType in choices)
    return found
