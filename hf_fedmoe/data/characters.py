"""
Texts as characters, without a tokenizer: numbers of characters, and windows of them whose class is the next one.

Shape suffixes: B texts, T characters of a window, N windows.
"""

import string
import unicodedata
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from torch import Tensor

from .labels import column_as_numpy


# The 100 printable characters of ASCII; a character's number is its place here.
CHARACTERS = string.printable
CONTROL_NAMES = {"\t": "tab", "\n": "newline", "\r": "carriage return", "\x0b": "vertical tab", "\x0c": "form feed"}
# For class labels: tables, plots and cards would choke on some of the characters themselves.
CHARACTER_NAMES = [
    character if character.isalnum() else CONTROL_NAMES.get(character) or unicodedata.name(character).lower()
    for character in CHARACTERS
]
PAD_CHARACTER = len(CHARACTERS) - 1

_UNKNOWN = 255
_NUMBERS = np.full(128, _UNKNOWN, dtype=np.uint8)
_NUMBERS[[ord(character) for character in CHARACTERS]] = np.arange(len(CHARACTERS))


def encode_characters(text: str) -> np.ndarray:
    """
    The numbers of a text's characters.

    Args:
        text (`str`): Of characters in `CHARACTERS`.

    Returns:
        `np.ndarray`: Shape `[len(text)]`, uint8.

    Raises:
        ValueError: Naming the first character that is not among the 100.
    """
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    numbers = np.where(codes < len(_NUMBERS), _NUMBERS[np.minimum(codes, len(_NUMBERS) - 1)], _UNKNOWN)
    if (unknown := numbers == _UNKNOWN).any():
        place = int(unknown.argmax())
        raise ValueError(
            f"The text has {text[place]!r} at place {place}, which is none of the {len(CHARACTERS)} printable "
            "characters of ASCII. Replace such characters first, for example "
            "unicodedata.normalize('NFKD', text).encode('ascii', 'ignore').decode()."
        )
    return numbers


def decode_characters(numbers: Sequence[int] | np.ndarray) -> str:
    """The text of which [`encode_characters`] gives these numbers."""
    return "".join(CHARACTERS[number] for number in numbers)


def character_inputs(texts: Sequence[str], length: int = 80) -> dict[str, Tensor]:
    """
    The inputs of a character model for texts of any length: their last characters, padded on the right.

    Args:
        texts (`Sequence[str]`): B texts.
        length (`int`, *optional*, defaults to 80): Characters that are kept of a text.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids` and `attention_mask` of shape `[B, T]`, T up to `length`.
    """
    encoded = [torch.from_numpy(encode_characters(text[-length:]).astype(np.int64)) for text in texts]
    masks = [torch.ones_like(numbers) for numbers in encoded]
    pad = torch.nn.utils.rnn.pad_sequence
    return {"input_ids": pad(encoded, True, PAD_CHARACTER), "attention_mask": pad(masks, True, 0)}


def next_character_windows(
    rows: Dataset,
    length: int = 80,
    stride: int = 1,
    train_share: float = 0.8,
    text_column: str = "text",
    role_column: str = "role_id",
) -> DatasetDict:
    """
    Cuts what each role says into windows of characters whose class is the next character (LEAF's Shakespeare).

    A role's lines stand in the order of `rows`; the first `train_share` of them, rounded, are for training and the
    others, at least one, for the test. Each part is one text, its lines joined and runs of blanks made one space, and
    no window reaches from one part or role into another. A role that says `length` characters or less in a part has no
    window there.

    With a stride up to `length` neighbouring windows share characters: what clients do not see must then be whole
    roles ([`hold_out_ids`]), not windows.

    Args:
        rows (`datasets.Dataset`): Speeches, of one line or more each.
        length (`int`, *optional*, defaults to 80): Characters T of a window.
        stride (`int`, *optional*, defaults to 1): Characters from the start of one window to the next.
        train_share (`float`, *optional*, defaults to 0.8): Share of a role's lines for training, in (0, 1).
        text_column (`str`, *optional*, defaults to `"text"`): Column of speeches.
        role_column (`str`, *optional*, defaults to `"role_id"`): Column that says whose they are.

    Returns:
        `datasets.DatasetDict`: `train` and `test` with the columns `input_ids` (T bytes), `label` (a `ClassLabel` of
        100 characters) and `role_column` (a `ClassLabel` of all roles), for the partition [`natural`].

    Raises:
        ValueError: When a column or a value in it is missing, a number is out of its range, a text has other
            characters, or no role says enough for one window.
    """
    for name, column in (("text_column", text_column), ("role_column", role_column)):
        if column not in rows.column_names:
            raise ValueError(f"{name} is {column!r}, but the data has the columns {rows.column_names}. Name another.")
    for name, value in (("length", length), ("stride", stride)):
        if value < 1:
            raise ValueError(f"{name} is {value}, but must be at least 1.")
    if not 0 < train_share < 1:
        raise ValueError(f"train_share is {train_share}, but must lie between 0 and 1, both excluded.")
    roles, speeches = (column_as_numpy(rows, column).tolist() for column in (role_column, text_column))
    if missing := sum(role is None or speech is None for role, speech in zip(roles, speeches, strict=True)):
        raise ValueError(
            f"{missing} of {len(rows)} rows lack {text_column!r} or {role_column!r}. Remove them: "
            f"dataset.filter(lambda row: row[{text_column!r}] is not None and row[{role_column!r}] is not None)."
        )
    lines_by_role: dict[str, list[str]] = {}
    for role, speech in zip(roles, speeches, strict=True):
        lines_by_role.setdefault(role, []).extend(line for line in speech.splitlines() if line.strip())

    parts: dict[str, dict[int, np.ndarray]] = {"train": {}, "test": {}}
    for role, lines in enumerate(lines_by_role.values()):
        num_train = min(round(train_share * len(lines)), len(lines) - 1)
        for part, chosen in (("train", lines[:num_train]), ("test", lines[num_train:])):
            numbers = encode_characters(" ".join(" ".join(chosen).split()))
            if len(numbers) > length:
                parts[part][role] = np.lib.stride_tricks.sliding_window_view(numbers, length + 1)[::stride]
    for part, windows in parts.items():
        if not windows:
            raise ValueError(
                f"None of the {len(lines_by_role)} roles in {role_column!r} says more than length = {length} "
                f"characters in its lines for {part}. Lower length, or change train_share = {train_share}."
            )
    features = Features(
        {
            "input_ids": List(Value("uint8"), length=length),
            "label": ClassLabel(names=CHARACTER_NAMES),
            role_column: ClassLabel(names=[str(role) for role in lines_by_role]),
        }
    )
    return DatasetDict({part: _as_dataset(windows, features, length) for part, windows in parts.items()})


def _as_dataset(windows_by_role: dict[int, np.ndarray], features: Features, length: int) -> Dataset:
    windows_NT = np.concatenate(list(windows_by_role.values()))
    role_N = np.repeat(list(windows_by_role), [len(windows) for windows in windows_by_role.values()])
    # Straight into Arrow's memory: millions of windows would take minutes as Python lists.
    columns = [
        pa.FixedSizeListArray.from_arrays(pa.array(windows_NT[:, :length].ravel()), length),
        pa.array(windows_NT[:, length].astype(np.int64)),
        pa.array(role_N),
    ]
    return Dataset(pa.table(columns, schema=features.arrow_schema))
