"""Make the texts of owners that ship with hf_fedmoe: five owners', public text, and text that is nobody's.

    python recipes/assets/make_owners.py SOURCE --films FILMS --out hf_fedmoe/assets/owners

SOURCE is a parquet file with the columns owner, split (train, reserved, test) and text, documents whole, of which
politics, scripture, code and public_masc are taken; FILMS one with a column text, a sentence a row. Plays and reviews
are those that the package has already. No document is in two splits.
"""

import argparse
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq


ASSETS = Path(__file__).parents[2] / "hf_fedmoe" / "assets"
# Characters of an owner.
SIZES = {"train": 400_000, "reserved": 60_000, "test": 100_000}
# Public text is for the router, and to see what becomes of it.
PUBLIC_SIZES = {"train": 120_000, "reserved": 40_000, "test": 60_000}
TAKEN = {"politics": "politics", "scripture": "scripture", "code": "code", "public_masc": "public"}
OTHELLO = "The Tragedy of Othello, the Moor of Venice"


def cut(documents: list[str], size: int) -> list[str]:
    """Returns the first documents, `size` characters at most; the last ones are cut, at a line's end if possible."""
    kept: list[str] = []
    for document in documents:
        document = document[:size]
        if len(document) == size:
            document = document[: document.rfind("\n") + 1] or document
        if not document.strip():
            break
        kept.append(document)
        size -= len(document)
    return kept


def plays() -> dict[str, list[str]]:
    """Returns the scenes of each split: Othello is what is held out."""
    frame = pd.read_parquet(ASSETS / "shakespeare" / "train.parquet")
    frame["speech"] = frame["role_id"].str.split(" / ").str[1] + "\n" + frame["text"] + "\n"
    scenes = frame.groupby(["play", "act", "scene"], sort=False)["speech"].agg("\n".join)
    held_out = scenes[scenes.index.get_level_values("play") == OTHELLO].tolist()
    others = scenes[scenes.index.get_level_values("play") != OTHELLO].tolist()
    third = len(held_out) // 3
    return {"train": others, "reserved": held_out[:third], "test": held_out[third:]}


def reviews() -> dict[str, list[str]]:
    """Returns reviews of each split, twenty a document."""
    train = pd.read_parquet(ASSETS / "reviews" / "train.parquet")["text"].tolist()
    test = pd.read_parquet(ASSETS / "reviews" / "test.parquet")["text"].tolist()
    parts = {"train": train[:2000], "reserved": train[2000:2400], "test": test[:500]}
    return {split: ["\n".join(rows[i : i + 20]) for i in range(0, len(rows), 20)] for split, rows in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="parquet file with the columns owner, split and text")
    parser.add_argument("--films", type=Path, required=True, help="parquet file with a column text")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets texts.parquet")
    args = parser.parse_args()

    source = pd.read_parquet(args.source, columns=["owner", "split", "text"])
    owners: dict[str, dict[str, list[str]]] = {}
    for found, owner in TAKEN.items():
        of_owner = source[source["owner"] == found]
        owners[owner] = {split: of_owner[of_owner["split"] == split]["text"].tolist() for split in SIZES}
    sentences = pd.read_parquet(args.films)["text"].tolist()
    owners |= {"plays": plays(), "reviews": reviews()}
    owners["films"] = {"test": ["\n".join(sentences[i : i + 20]) for i in range(0, 900, 20)]}
    schema = datasets.Features({name: datasets.Value("string") for name in ("owner", "split", "text")}).arrow_schema
    rows = [
        {"owner": owner, "split": split, "text": text}
        for owner, splits in owners.items()
        for split, documents in splits.items()
        for text in cut(documents, (PUBLIC_SIZES if owner == "public" else SIZES)[split])
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "texts.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, compression="zstd", compression_level=19)
    frame = pd.DataFrame(rows)
    frame["characters"] = frame["text"].str.len()
    print(frame.groupby(["owner", "split"])["characters"].agg(["size", "sum"]))
    print(f"{path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
