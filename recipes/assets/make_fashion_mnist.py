"""
Makes `fashion_mnist_train.parquet` and `fashion_mnist_test.parquet` in $HF_FEDMOE_DATA, the garments of
`recipes/groups/pictures.yaml`, of the files that the Debian package dataset-fashion-mnist installs (MIT licence):

    apt-get install dataset-fashion-mnist
    HF_FEDMOE_DATA=<folder> python recipes/assets/make_fashion_mnist.py /usr/share/datasets/fashion-mnist
"""

import argparse
import gzip
import os
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image


NAMES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
FEATURES = Features({"image": Image(mode="L"), "label": ClassLabel(names=NAMES)})
# Bytes before the data in files of images and of labels.
IMAGES_START, LABELS_START = 16, 8


def read(path: Path, start: int) -> np.ndarray:
    """Returns the bytes of a gzipped IDX file after its header."""
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="With train-images-idx3-ubyte.gz and three more.")
    folder, out = parser.parse_args().folder, os.environ.get("HF_FEDMOE_DATA")
    if not out:
        parser.error("HF_FEDMOE_DATA is not set: name the folder of data there.")
    for split, prefix in {"train": "train", "test": "t10k"}.items():
        labels_N = read(folder / f"{prefix}-labels-idx1-ubyte.gz", LABELS_START)
        images_NYX = read(folder / f"{prefix}-images-idx3-ubyte.gz", IMAGES_START).reshape(len(labels_N), 28, 28)
        rows = Dataset.from_dict({"image": list(images_NYX), "label": labels_N}, features=FEATURES)
        rows.to_parquet(Path(out, f"fashion_mnist_{split}.parquet"))
        print(f"fashion_mnist_{split}: {len(rows)} garments")


if __name__ == "__main__":
    main()
