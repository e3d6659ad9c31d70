"""Paths of what clients own: a file or a folder each, by the names of the clients."""

import os
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

from .client_names import check_client_names


OwnPath = str | os.PathLike


def named_paths(paths: Mapping[str, OwnPath] | Sequence[OwnPath]) -> dict[str, OwnPath]:
    """
    Names clients: as told, or by their files and folders, `"data/north.csv"` is north.

    Args:
        paths (`Mapping[str, str]` or `Sequence[str]`): By name, or in order; `"north=data/2024.csv"` names one too.

    Raises:
        ValueError: When there are none, or two clients have one name or one path.
    """
    if isinstance(paths, str | os.PathLike) or not isinstance(paths, Mapping | Sequence):
        raise ValueError(f"clients is {paths!r}: give a path for each client by its name, {{'north': 'north.csv'}}.")
    if not paths:
        raise ValueError("clients is empty: give at least one file or folder.")
    pairs = list(paths.items()) if isinstance(paths, Mapping) else [_named(path) for path in paths]
    names = check_client_names(name for name, _ in pairs)
    owner: dict[Path, str] = {}
    for name, (_, path) in zip(names, pairs, strict=True):
        first = owner.setdefault(Path(path).expanduser().resolve(), name)
        if first != name:
            raise ValueError(
                f"Clients {first!r} and {name!r} both have {str(path)!r}: give each its own, or divide one file, "
                "FederatedDataset.split."
            )
    return {name: path for name, (_, path) in zip(names, pairs, strict=True)}


def _named(path: OwnPath) -> tuple[str, OwnPath]:
    name, sign, rest = str(path).partition("=")
    if sign and not Path(path).exists():
        return name, rest
    return Path(path).stem if Path(path).suffix else Path(path).resolve().name, path


def check_paths(paths: Mapping[str, OwnPath], suffixes: Collection[str], what: str) -> None:
    """
    Raises `ValueError` for the first path that is not there, or is of the wrong kind.

    Args:
        paths (`Mapping[str, str]`): By client or split.
        suffixes (`Collection[str]`): Endings that files may have; of folders none.
        what (`str`): `"file"` or `"folder"`.
    """
    for name, given in paths.items():
        path = Path(given).expanduser()
        if not path.exists():
            beside = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
            near = [name for name in get_close_matches(path.name, beside) if _resemble(path.stem, Path(name).stem)][:1]
            remedy = f"is it {str(path.parent / near[0])!r}?" if near else f"check the path, from {Path.cwd()}."
            raise ValueError(f"There is no {what} {str(given)!r} of {name!r}: {remedy}")
        if what == "file" and path.is_dir():
            raise ValueError(
                f"{str(given)!r} of {name!r} is a folder: give a file of {', '.join(suffixes)}, or folders of images "
                "with FederatedDataset.from_folders (--images)."
            )
        if what == "folder" and not path.is_dir():
            raise ValueError(f"{str(given)!r} of {name!r} is a file: give a folder with a subfolder for each class.")
        if suffixes and path.suffix.lower() not in suffixes:
            raise ValueError(
                f"{str(given)!r} of {name!r} ends in {path.suffix or 'nothing'!r}: give a file of "
                f"{', '.join(suffixes)}."
            )


def _resemble(name: str, other: str) -> bool:
    """Compares names without their endings, which make any two of them alike."""
    return bool(get_close_matches(name.casefold(), [other.casefold()]))


def files_and_sizes(
    **given: OwnPath | int | float | None,
) -> tuple[dict[str, OwnPath], dict[str, int | float]]:
    """Tells splits that have a file or folder of their own from those that are split off by their size."""
    files = {name: value for name, value in given.items() if isinstance(value, str | os.PathLike)}
    sizes = {name: v for name, v in given.items() if v is not None and not isinstance(v, str | os.PathLike)}
    return files, sizes
