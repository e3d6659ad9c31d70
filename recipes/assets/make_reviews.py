"""Make the reviews that ship with hf_fedmoe: one fixed train/test split of the women's clothing reviews.

    python recipes/assets/make_reviews.py SOURCE --out hf_fedmoe/assets/reviews

SOURCE is a parquet file with the columns text, label (0..4) and department. Same source, same seed: same rows in the
same order.
"""

import argparse
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq


LABEL_NAMES = ["1 star", "2 stars", "3 stars", "4 stars", "5 stars"]


def split_by_text(frame: pd.DataFrame, test_share: float, seed: int) -> np.ndarray:
    """
    Draws the test rows, stratified by label, with all rows of one text on the same side.

    Args:
        frame (`pd.DataFrame`): Rows with the columns `text` and `label`.
        test_share (`float`): Share of every label's texts that goes to the test part.
        seed (`int`): Seed of the draw.

    Returns:
        `np.ndarray`: Booleans of shape `(rows,)`, true for test rows.
    """
    rng = np.random.default_rng(seed)
    # Reviews posted twice can differ in case and blanks only, and in stars: a text counts where it first occurs.
    text_key = frame["text"].str.casefold().str.split().str.join(" ")
    first_rows = frame[~text_key.duplicated()]
    test_keys: set[str] = set()
    for _, same_label in first_rows.groupby("label", sort=True):
        count = round(test_share * len(same_label))
        test_keys.update(text_key[rng.permutation(same_label.index)[:count]])
    return text_key.isin(test_keys).to_numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="parquet file with the columns text, label and department")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets train.parquet and test.parquet")
    parser.add_argument("--test_share", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    frame = pd.read_parquet(args.source, columns=["text", "label", "department"])
    frame["text"] = frame["text"].fillna("").str.strip()
    frame = frame[frame["text"] != ""].reset_index(drop=True)
    if not frame["label"].between(0, len(LABEL_NAMES) - 1).all():
        raise ValueError(f"label must be in 0..4, got {sorted(frame['label'].unique())}: subtract 1 from the stars")
    # A missing department would be a null key in a partition by department.
    frame["department"] = frame["department"].fillna("Unknown")

    is_test = split_by_text(frame, args.test_share, args.seed)
    features = datasets.Features(
        text=datasets.Value("string"),
        label=datasets.ClassLabel(names=LABEL_NAMES),
        department=datasets.Value("string"),
    )
    args.out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(args.seed)
    for name, rows in (("train", frame[~is_test]), ("test", frame[is_test])):
        rows = rows.iloc[rng.permutation(len(rows))]  # so that the first n rows are a random sample
        # `Dataset.to_parquet` chooses the compression itself; this schema carries the same feature metadata.
        schema = features.arrow_schema
        table = pa.Table.from_pandas(rows, schema=schema, preserve_index=False)
        path = args.out / f"{name}.parquet"
        pq.write_table(table.replace_schema_metadata(schema.metadata), path, compression="zstd", compression_level=19)
        counts = np.bincount(rows["label"], minlength=len(LABEL_NAMES)).tolist()
        print(f"{name}: {len(rows)} rows, {path.stat().st_size} bytes, stars {counts}")
        print("  departments", rows["department"].value_counts().to_dict())


if __name__ == "__main__":
    main()
