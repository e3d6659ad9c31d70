"""The rows of a client, by what `hf-fedmoe client --data` says, and those of the server."""

import importlib.util
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, Value

from ..data import load_named_classes
from ..data.own_folders import list_images


def client_rows(data: str, columns: dict[str, Any]) -> Dataset:
    """
    Returns a client's rows, with columns `text` or `image`, and `label`.

    Args:
        data (`str`): A file, a folder of images with a subfolder for each class, or a name that
            [`~data.load_source`] knows, or `file.py:function`, which returns a `datasets.Dataset` or such a name.
        columns (`dict`): Names of the columns, where they are not obvious.
    """
    file, _, function = data.rpartition(":")
    found: Any = data
    if file.endswith(".py"):
        found = _function_of(Path(file), function)()
    if isinstance(found, Dataset):
        return found
    return named_rows(str(found), columns)


def named_rows(name: str, columns: dict[str, Any]) -> Dataset:
    """
    Returns rows whose classes are called by their names.

    Args:
        name (`str`): A file, a folder of images with a subfolder for each class, or a name that
            [`~data.load_source`] knows.
        columns (`dict`): Names of the columns, where they are not obvious.
    """
    if "image_column" not in columns or not Path(name).expanduser().is_dir():
        return load_named_classes(name, **columns)
    images = list_images(name)
    features = Features({"image": Image(), "label": Value("string")})
    return Dataset.from_dict(
        {"image": [str(path) for _, path in images], "label": [label for label, _ in images]}, features
    )


def _function_of(file: Path, name: str) -> Any:
    if not file.is_file():
        raise ValueError(f"`data` names the file {str(file)!r}, which is not there: check the path.")
    spec = importlib.util.spec_from_file_location(f"hf_fedmoe_data_{file.stem}", file)
    assert spec is not None and spec.loader is not None  # as of every file that ends in .py
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(vars(module).get(name)):
        raise ValueError(f"`data` names the function {name!r}, which {str(file)!r} has not.")
    return vars(module)[name]
