"""Texts of owners, of the public and of others, from one file."""

from collections.abc import Mapping, Sequence
from importlib.resources import files

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from ..data import pack


SHIPPED = "owners"
# By owner and split.
Texts = dict[str, dict[str, list[str]]]


def read_owner_texts(name: str, wanted: Mapping[str, Sequence[str]], setting: str) -> Texts:
    """
    Reads texts by owner and split.

    Args:
        name (`str`): `"owners"`, which is shipped, or a .parquet with columns `owner`, `split` and `text`.
        wanted (`Mapping[str, Sequence[str]]`): The splits that are needed of each owner.
        setting (`str`): The setting that has the name, for messages.

    Raises:
        `ValueError`: If there is no such file, or somebody has no text in a split.
    """
    path = files("hf_fedmoe") / "assets" / SHIPPED / "texts.parquet" if name == SHIPPED else name
    try:
        rows = pq.read_table(str(path), columns=["owner", "split", "text"]).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise ValueError(
            f"`{setting}` is {name!r}, which cannot be read ({error}): name a .parquet with the columns owner, split "
            "and text."
        ) from error
    found: Texts = {}
    for number, row in enumerate(rows):
        if wrong := [column for column, value in row.items() if not isinstance(value, str)]:
            raise ValueError(
                f"`{setting}` is {name!r}, whose row {number} has {row[wrong[0]]!r} as {wrong[0]!r}: write texts only "
                "and leave out rows without one."
            )
        found.setdefault(row["owner"], {}).setdefault(row["split"], []).append(row["text"])
    for owner, splits in wanted.items():
        for split in splits:
            if not found.get(owner, {}).get(split):
                raise ValueError(
                    f"`{setting}` is {name!r}, which has no {split} text of {owner!r}: choose from "
                    f"{', '.join(sorted(found))}."
                )
    return found


def pack_text(
    tokenizer: PreTrainedTokenizerBase, texts: Texts, owner: str, split: str, sequence_length: int
) -> list[list[int]]:
    """Cuts an owner's texts into rows of one length; raises `ValueError` that names them where they are too short."""
    try:
        return pack(tokenizer, texts[owner][split], sequence_length)
    except ValueError as error:
        raise ValueError(f"The {split} text of {owner!r}: {error}") from error
