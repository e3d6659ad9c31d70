"""An owner's text, from files."""

import os
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.json as pj
import pyarrow.parquet as pq
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..data import pack, token_rows
from ..data.token_rows import COMPLETION, MESSAGES, PROMPT


# Files of rows, which may be conversations or prompts with completions.
ROWS = (".parquet", ".jsonl")


def read_rows(
    paths: str | os.PathLike | Iterable[str | os.PathLike],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    text_column: str = "text",
) -> list[dict[str, list[int]]]:
    """
    Reads files as rows of tokens: texts are packed, one after the other; of a `.parquet` or `.jsonl` with a column
    `messages`, or with `prompt` and `completion`, each row is one, of which the answers are learned.

    Args:
        paths (`str`, `os.PathLike`, or several): Files and folders.
        tokenizer (`PreTrainedTokenizerBase`): The base's.
        sequence_length (`int`): Tokens of a row, at most.
        text_column (`str`, *optional*, defaults to `"text"`): Column of the texts of other `.parquet` and `.jsonl`.

    Returns:
        `list[dict[str, list[int]]]`: With `input_ids` and `labels`, see [`token_rows`].

    Raises:
        `ValueError`: If a file cannot be read or has nothing to learn; names it and the remedy.
    """
    rows: list[dict[str, list[int]]] = []
    texts: list[Path] = []
    for file in _files(paths):
        columns = _table(file).column_names if file.suffix in ROWS else []
        if MESSAGES not in columns and not {PROMPT, COMPLETION} <= set(columns):
            texts.append(file)
            continue
        try:
            rows += token_rows(Dataset.from_list(_table(file).to_pylist()), tokenizer, sequence_length).to_list()
        except ValueError as error:
            raise ValueError(f"`text` has {str(file)!r}: {error}") from error
    if texts:
        packed = pack(tokenizer, read_texts(texts, text_column), sequence_length)
        rows += [{"input_ids": row, "labels": row} for row in packed]
    return rows


def read_texts(paths: str | os.PathLike | Iterable[str | os.PathLike], text_column: str = "text") -> list[str]:
    """
    Reads texts from files: a `.parquet` or `.jsonl` has one in each row, any other file is one. Of a folder all files
    are read, those of folders in it too, in the order of their names; hidden ones are left out.

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
    texts: list[str] = []
    for file in _files(paths):
        texts += _rows(file, text_column) if file.suffix in ROWS else [_decoded(file)]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"`text` is {_said(paths)}, where no text is: name files that have some.")
    return texts


def _files(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> list[Path]:
    files: list[Path] = []
    for path in map(Path, [paths] if isinstance(paths, (str, os.PathLike)) else paths):
        if not path.exists():
            raise ValueError(f"`text` is {str(path)!r}, which is not there: name a file, a folder or a .parquet.")
        files += _files_in(path) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"`text` is {_said(paths)}, where no text is: name files that have some.")
    return files


def _said(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> list[str]:
    return [str(path) for path in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)]


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


def _table(file: Path) -> pa.Table:
    try:
        return pq.read_table(file) if file.suffix == ".parquet" else pj.read_json(file)
    except pa.ArrowInvalid as error:
        kind = "parquet file" if file.suffix == ".parquet" else "file of a JSON object in each line"
        raise ValueError(f"`text` has {str(file)!r}, which is no whole {kind} ({error}): write it again.") from None


def _rows(file: Path, text_column: str) -> list[str]:
    table = _table(file)
    if text_column not in table.column_names:
        raise ValueError(
            f"`text` has {str(file)!r} without a column {text_column!r}: name one of {table.column_names} as "
            "`text_column`."
        )
    rows = table[text_column].to_pylist()
    if any(not isinstance(row, str) for row in rows if row is not None):
        raise ValueError(
            f"`text_column` is {text_column!r}, which is no column of texts in {str(file)!r}: name one of "
            f"{table.column_names}."
        )
    return [row for row in rows if row is not None]
