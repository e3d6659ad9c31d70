"""An owner's text, from files."""

import os
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def read_texts(paths: str | os.PathLike | Iterable[str | os.PathLike], text_column: str = "text") -> list[str]:
    """
    Reads texts from files: a `.parquet` has one in each row, any other file is one. Of a folder all files are read,
    those of folders in it too, in the order of their names; hidden ones are left out.

    Args:
        paths (`str`, `os.PathLike`, or several):
            Files and folders.
        text_column (`str`, *optional*, defaults to `"text"`):
            Column of a `.parquet`.

    Returns:
        `list[str]`: The texts that are not empty.

    Raises:
        `ValueError`: If a file is not there or holds no text, or all are empty; names it and the remedy.
    """
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    texts: list[str] = []
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"`text` is {str(path)!r}, which is not there: name a file, a folder or a .parquet.")
        for file in _files_in(path) if path.is_dir() else [path]:
            texts += _rows(file, text_column) if file.suffix == ".parquet" else [_decoded(file)]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"`text` is {[str(path) for path in paths]}, where no text is: name files that have some.")
    return texts


def _files_in(folder: Path) -> list[Path]:
    files = []
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if file.is_file() and not hidden:
            files.append(file)
    return files


def _decoded(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"`text` has {str(file)!r}, which is not UTF-8 (byte {error.start}): save it so, or name only files of "
            "text."
        ) from None


def _rows(file: Path, text_column: str) -> list[str]:
    try:
        schema = pq.read_schema(file)
        if text_column not in schema.names:
            raise ValueError(
                f"`text` has {str(file)!r} without a column {text_column!r}: name one of {schema.names} as "
                "`text_column`."
            )
        rows = pq.read_table(file, columns=[text_column])[text_column].to_pylist()
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"`text` has {str(file)!r}, which is no whole parquet file ({error}): write it again."
        ) from None
    if any(not isinstance(row, str) for row in rows if row is not None):
        raise ValueError(
            f"`text_column` is {text_column!r}, which is no column of texts in {str(file)!r}: name one of "
            f"{schema.names}."
        )
    return [row for row in rows if row is not None]
