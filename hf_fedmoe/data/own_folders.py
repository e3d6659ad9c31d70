"""Clients' own folders of images, in each a subfolder for every class."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pillow

from .counted import counted
from .labels import name_some
from .own_labels import one_label_map
from .own_paths import OwnPath, check_paths, named_paths


def read_own_folders(
    clients: Mapping[str, OwnPath] | Sequence[OwnPath],
    others: Mapping[str, OwnPath],
    classes: Sequence[str] | None = None,
) -> tuple[dict[str, Dataset], dict[str, Dataset]]:
    """
    Lists the images of folders; they are opened when they are needed.

    Args:
        clients (`Mapping[str, str]` or `Sequence[str]`): A folder of each client.
        others (`Mapping[str, str]`): Folders of the server, by the name of the split.
        classes (`Sequence[str]`, *optional*): See [`FederatedDataset.from_folders`].

    Returns:
        `tuple[dict[str, datasets.Dataset], dict[str, datasets.Dataset]]`: Clients and splits by their names, with the
        columns `image` and `label`, a `datasets.ClassLabel` that is the same for all.

    Raises:
        ValueError: Names the folder and the remedy.

    Warns:
        UserWarning: When files are left out: images in no subfolder, and what has the ending of no image.
    """
    paths = named_paths(clients)
    check_paths({**paths, **others}, (), "folder")
    found = {path: list_images(path) for path in dict.fromkeys([*paths.values(), *others.values()])}
    labels = {repr(str(path)): np.array([name for name, _ in images], dtype=object) for path, images in found.items()}
    kind = one_label_map(labels, "subfolder", classes)
    tables = {path: _table(images, kind) for path, images in found.items()}
    return (
        {name: tables[path] for name, path in paths.items()},
        {name: tables[path] for name, path in others.items()},
    )


def _table(images: list[tuple[str, Path]], kind: ClassLabel) -> Dataset:
    columns = {"image": [str(path) for _, path in images], "label": [kind.str2int(name) for name, _ in images]}
    return Dataset.from_dict(columns, features=Features({"image": Image(), "label": kind}))


def list_images(folder: OwnPath) -> list[tuple[str, Path]]:
    """
    Returns the class and the path of each image of a folder with a subfolder for every class, sorted.

    Args:
        folder (`str`): The folder.

    Raises:
        ValueError: When it has no subfolders, or one of them no images.
    """
    endings = image_endings()
    images: list[tuple[str, Path]] = []
    shown = [path for path in sorted(Path(folder).expanduser().iterdir()) if _is_shown(path)]
    subfolders = [path for path in shown if path.is_dir()]
    for subfolder in subfolders:
        files = [path for path in sorted(subfolder.rglob("*")) if path.is_file() and _is_shown(path)]
        own = [(subfolder.name.strip(), path) for path in files if path.suffix.lower() in endings]
        if not own:
            raise ValueError(
                f"{str(subfolder)!r} has no images: put some of this class there, or take the folder away."
            )
        if left_out := [path.name for path in files if path.suffix.lower() not in endings]:
            warnings.warn(
                f"{str(subfolder)!r} has {counted(len(left_out), 'file')} with the ending of no image that Pillow "
                f"reads, left out: {name_some(left_out)}.",
                stacklevel=5,
            )
        images += own
    _warn_of_clients_within(folder, images)
    beside = [path.name for path in shown if path.is_file() and path.suffix.lower() in endings]
    if images and beside:
        warnings.warn(
            f"{str(folder)!r} has {counted(len(beside), 'image')} outside of its subfolders, left out: "
            f"{name_some(beside)}. Put {'it' if len(beside) == 1 else 'them'} into the subfolder of a class.",
            stacklevel=5,
        )
    if not images:
        raise ValueError(
            f"{str(folder)!r} has no subfolders: put its images into one for each class, {folder}/cat/1.png, "
            f"{folder}/dog/1.png."
        )
    return images


def _warn_of_clients_within(folder: OwnPath, images: list[tuple[str, Path]]) -> None:
    """Says so where it looks as if subfolders were clients: all images lie deeper, in folders that each has."""
    deeper: dict[str, set[str]] = {}
    for name, path in images:
        deeper.setdefault(name, set()).add(path.parent.name)
    common = sorted(set.intersection(*deeper.values())) if len(deeper) > 1 else []
    if len(common) > 1 and not any(name in within for name, within in deeper.items()):
        warnings.warn(
            f"The subfolders of {str(folder)!r}, {name_some(list(deeper))}, are taken for classes, but each has "
            f"folders {name_some(common)}: if they are clients, give each of them by itself.",
            stacklevel=5,
        )


def image_endings() -> set[str]:
    """Returns the endings of files that Pillow reads; some, as .pdf, it only writes."""
    endings = Pillow.registered_extensions()  # also fills the table of readers
    return {ending for ending, kind in endings.items() if kind in Pillow.OPEN}


def _is_shown(path: Path) -> bool:
    return not path.name.startswith((".", "_")) and path.name.lower() not in ("thumbs.db", "desktop.ini")
