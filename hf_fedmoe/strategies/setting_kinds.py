"""Settings are of the kind that their annotation says: checked for all, before anything is compared with them."""

import math
import numbers
import typing
from collections.abc import Iterable, Mapping
from functools import cache
from types import NoneType, UnionType
from typing import Any


# What a field is annotated with, what its value has to be, and what a message calls that.
KINDS = {int: (numbers.Integral, "a whole number"), float: (numbers.Real, "a number")}
# What a list has, and what a message calls that.
LISTS = {int: "whole numbers", float: "numbers", str: "texts"}


def check_setting_kinds(settings: Any) -> None:
    """
    Checks numbers, switches, and lists of numbers or texts, of a dataclass by the annotations of its fields.

    Args:
        settings: Its fields of `int`, `float` or `bool` are looked at, lists and tuples of such or of `str`, and those
            that may be `None` besides.

    Raises:
        ValueError: When a number is none, a switch, or has a fraction that it must not have, or when a switch is a
            text, which would be on whatever it says, or a list is one text, whose letters it would have.
    """
    for name, (kind, optional, is_list) in _kinds(type(settings)).items():  # type: ignore[arg-type]  # has a hash
        value = vars(settings).get(name)
        if value is None:
            if optional or name not in vars(settings):
                continue
            raise ValueError(f"`{name}` is None: give {_called(kind, is_list)}, or leave it out.")
        if is_list:
            is_none = isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable)
            if is_none or any(_is_none(kind, each) for each in value):
                raise ValueError(f"`{name}` is {value!r}: give {_called(kind, is_list)}.")
        elif kind is bool:
            if isinstance(value, str):
                raise ValueError(f"`{name}` is {value!r}, a text: give {_called(kind, is_list)}.")
        elif _is_none(kind, value):
            raise ValueError(f"`{name}` is {value!r}: give {_called(kind, is_list)}.")


def _is_none(kind: type, value: Any) -> bool:
    """Tells whether a value is no number, or no text."""
    if kind is str:
        return not isinstance(value, str)
    return isinstance(value, bool) or not isinstance(value, KINDS[kind][0]) or math.isnan(value)


def _called(kind: type, is_list: bool) -> str:
    if is_list:
        return f"a list of {LISTS[kind]}"
    return "True or False" if kind is bool else KINDS[kind][1]


@cache
def _kinds(settings_class: type) -> dict[str, tuple[type, bool, bool]]:
    """Returns a type by the name of each field that is of one, whether it may be `None`, and whether it is a list."""
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
            found[name] = (kinds[0], NoneType in choices, False)
        elif len(kinds) == 1 and typing.get_origin(kinds[0]) in (list, tuple):
            of, *others = typing.get_args(kinds[0])
            if of in LISTS and others in ([], [...]):
                found[name] = (of, NoneType in choices, True)
    return found
