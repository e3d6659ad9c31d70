"""Names of clients, for people: everything else goes by their numbers."""

import unicodedata
from collections.abc import Hashable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import TypeVar

import numpy as np


# Unicode's categories of control characters and separators of lines and paragraphs.
LINE_BREAKS = ("Cc", "Zl", "Zp")
T = TypeVar("T")


def names_and_parts(parts: Sequence[T] | Mapping[str, T], start: int = 0) -> tuple[list[str], list[T]]:
    """
    Names of clients, and what each has. Without names they are called by their numbers, from `start` on.

    Raises:
        ValueError: See [`check_client_names`].
    """
    if isinstance(parts, Mapping):
        return check_client_names(parts), list(parts.values())
    return [str(client) for client in range(start, start + len(parts))], list(parts)


def check_client_names(names: Iterable[Hashable]) -> list[str]:
    """
    Checks that names can stand in a table or a message and tell clients apart.

    Args:
        names (`Iterable[str]`): In the order of the clients; integers become strings.

    Raises:
        ValueError: When a name is empty, no string or of several lines, or two clients have the same.
    """
    checked: dict[str, int] = {}
    for client, name in enumerate(names):
        if isinstance(name, bool) or not isinstance(name, str | int | np.integer):
            raise ValueError(f"The name of client {client} is {name!r}, a {type(name).__name__}: give a string.")
        name = str(name)
        if not name or name != name.strip() or any(unicodedata.category(c) in LINE_BREAKS for c in name):
            raise ValueError(
                f"The name of client {client} is {name!r}: give one that is not empty, on one line, without spaces "
                "around it."
            )
        if name in checked:
            raise ValueError(
                f"Clients {checked[name]} and {client} are both called {name!r}: give each a name of its own."
            )
        checked[name] = client
    return list(checked)


def place_of_name(name: str, names: Sequence[str]) -> int:
    """The place of a client's name; raises a `KeyError` that lists those there are when it is none of them."""
    if name not in names:
        close = get_close_matches(name, names, n=3)
        raise KeyError(f"There is no client {name!r}. " + (f"Meant {close}?" if close else f"There are {names[:9]}."))
    return names.index(name)
