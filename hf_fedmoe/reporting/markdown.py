"""Names that people have given, as plain text in Markdown."""

import re
from collections.abc import Iterable


class Markup(str):
    """Text that is Markdown already."""


def plain(text: object) -> str:
    """
    Writes `text` so that Markdown, and the HTML in it, shows it as it is, on one line: characters that mean something
    become their numbers, which tables, headings and lists leave alone.
    """
    if isinstance(text, Markup):
        return text
    line = " ".join(str(text).encode("utf-8", "replace").decode().split())
    # Underscores within a word mean nothing.
    return re.sub(r"[&<>|`*\[\]\\~$]|(?<!\w)_|_(?!\w)", lambda found: f"&#{ord(found[0])};", line)


def code(text: object) -> Markup:
    """Writes `text` as code where nothing in it means something to Markdown, and plainly elsewhere."""
    return Markup(f"`{text}`" if plain(text) == str(text) else plain(text))


def table(rows: Iterable[Iterable[object]], head: list[object]) -> str:
    """A Markdown table; cells are plain text but for [`Markup`]."""
    lines: list[Iterable[object]] = [head, [Markup("---")] * len(head), *rows]
    return "\n".join("| " + " | ".join(plain(cell) for cell in line) + " |" for line in lines)
