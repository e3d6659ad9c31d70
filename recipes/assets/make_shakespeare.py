"""Make the plays that ship with hf_fedmoe: the speeches of some plays of Shakespeare, by role.

    python recipes/assets/make_shakespeare.py SOURCE --out hf_fedmoe/assets/shakespeare

SOURCE is a parquet file with the columns play, act, scene, role_id and text, one row for each speech, in order.
"""

import argparse
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq


PLAYS = ["As You Like It", "The Tragedy of Hamlet, Prince of Denmark", "The Tragedy of Othello, the Moor of Venice"]
KINDS = {"play": "string", "act": "int64", "scene": "int64", "role_id": "string", "text": "string"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="parquet file with one row for each speech")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets train.parquet")
    parser.add_argument("--plays", nargs="+", default=PLAYS)
    args = parser.parse_args()

    frame = pd.read_parquet(args.source, columns=list(KINDS))
    if missing := set(args.plays) - set(frame["play"]):
        raise ValueError(f"SOURCE lacks the plays {sorted(missing)}, it has {sorted(set(frame['play']))}")
    frame = frame[frame["play"].isin(args.plays)]
    schema = datasets.Features({name: datasets.Value(kind) for name, kind in KINDS.items()}).arrow_schema
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "train.parquet"
    table = pa.Table.from_pandas(frame, schema=schema, preserve_index=False)
    pq.write_table(table.replace_schema_metadata(schema.metadata), path, compression="zstd", compression_level=19)
    print(f"{len(frame)} speeches of {frame['role_id'].nunique()} roles, {path.stat().st_size} bytes")
    print(frame.groupby("play")["role_id"].agg(["size", "nunique"]))
    print("characters", frame["text"].str.len().sum())


if __name__ == "__main__":
    main()
