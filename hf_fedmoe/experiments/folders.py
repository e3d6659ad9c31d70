"""The folders that results go to: what names them, whether they can be written, and whose results they have."""

import json
import re
import tempfile
from pathlib import Path
from typing import Any


# In bytes: a file system takes 255.
LONGEST = 150


def folder_of(row: str) -> str:
    """
    The folder of a row's runs.

    Raises:
        `ValueError`: When a row's name makes none.
    """
    if any(not sign.isprintable() for sign in row) or "|" in row:
        raise ValueError(f"`methods` has a row {row!r}, which breaks the table: leave out line breaks and '|'.")
    folder = re.sub(r"\W+", "-", row.replace("+", " plus ")).strip("-").lower()
    if not folder:
        raise ValueError(f"`methods` has a row {row!r}, which names no folder: give it a letter or a digit.")
    if len(folder.encode()) > LONGEST:
        raise ValueError(f"`methods` has a row {row[:40]!r}..., too long to name a folder: shorten it.")
    return folder


def check_writable(folder: Path, name: str) -> None:
    """Makes a folder; raises `ValueError` when nothing can be written into it. `name` is the setting that names it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"`{name}` is {str(folder)!r}, where nothing can be written ({error.strerror}).") from error


def claim_folder(out: Path, claim: dict[str, str | None], settings: dict[str, Any]) -> None:
    """
    Notes in `comparison.json` whose results a folder has.

    Args:
        out (`Path`): The folder.
        claim (`dict`): What tells one comparison from another: its file, its kind, its size.
        settings (`dict`): Those of all of its rows.

    Raises:
        `ValueError`: When the folder has runs of another comparison, or of this one with other settings.
    """
    settings = json.loads(json.dumps(settings))
    note = out / "comparison.json"
    if note.is_file() and any(out.glob("*/seed-*")):
        found = json.loads(note.read_text())
        theirs = found.pop("settings")
        for name, ours in claim.items():
            if found[name] != ours:
                raise ValueError(
                    f"{str(out)!r} has results of a comparison whose {name} is {found[name]!r}, and this one's is "
                    f"{ours!r}: choose another `--out`."
                )
        if theirs != settings:
            changed = sorted(name for name in theirs | settings if theirs.get(name) != settings.get(name))
            raise ValueError(
                f"{str(out)!r} has results of a comparison with another {', '.join(changed)}: choose another `--out`, "
                "or delete that folder."
            )
    note.write_text(json.dumps({**claim, "settings": settings}, indent=2) + "\n")
