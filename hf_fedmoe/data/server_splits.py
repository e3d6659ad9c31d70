"""The server's splits, held out by a seed before the rest is divided among clients."""

from collections.abc import Mapping
from numbers import Integral, Real

import numpy as np
from datasets import Dataset, concatenate_datasets

from .partitions import hold_out, hold_out_predominant


def hold_out_splits(
    labels: np.ndarray,
    sizes: Mapping[str, int | float],
    seed: int,
    stratify: bool = True,
    reserved_share: float | None = None,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """
    Draws the rows of each split.

    Args:
        labels (`np.ndarray`, shape `[N]`): Class of each row.
        sizes (`Mapping[str, int | float]`): Rows, or shares of all rows, by name of the split and in this order.
        seed (`int`): Of the draws.
        stratify (`bool`, *optional*, defaults to `True`): See [`FederatedDataset.split`].
        reserved_share (`float`, *optional*): See [`FederatedDataset.split`].

    Returns:
        `tuple[dict[str, np.ndarray], np.ndarray]`: Rows of the splits that have some, and the rows that remain.

    Raises:
        ValueError: When a size is none, or no rows would remain.
    """
    rng = np.random.default_rng(seed)
    remaining = np.arange(len(labels))
    held = {}
    for name, size in sizes.items():
        count = _count_rows(size, len(labels), name)
        if count >= len(remaining):
            raise ValueError(
                f"The {name} size is {count}, but only {len(remaining)} of {len(labels)} rows remain, and clients "
                "need some. Lower it."
            )
        if count:
            if name == "reserved" and reserved_share is not None:
                rows, rest = hold_out_predominant(labels[remaining], count, reserved_share, rng)
            else:
                rows, rest = hold_out(labels[remaining], count, rng, stratify)
            held[name], remaining = remaining[rows], remaining[rest]
    return held, remaining


def _count_rows(size: int | float, num_rows: int, name: str) -> int:
    if not isinstance(size, bool):
        if isinstance(size, Integral) and size >= 0:
            return int(size)
        if isinstance(size, Real) and not isinstance(size, Integral) and 0 <= size < 1:
            return round(float(size) * num_rows)
    raise ValueError(f"The {name} size is {size!r}, but must be a number of rows or a share in [0, 1).")


def split_off(
    clients: Mapping[str, Dataset], sizes: Mapping[str, int | float], seed: int
) -> tuple[dict[str, Dataset], dict[str, Dataset]]:
    """
    Takes the server's splits from the clients' own rows, in the proportions of the classes of all.

    Args:
        clients (`Mapping[str, datasets.Dataset]`): By name, with the labels in `label`.
        sizes (`Mapping[str, int | float]`): Rows, or shares of all rows, by name of the split and in this order.
        seed (`int`): Of the draws.

    Returns:
        `tuple[dict[str, datasets.Dataset], dict[str, datasets.Dataset]]`: What the clients keep, and the splits.

    Raises:
        ValueError: When a size is none, or a client would keep nothing.
    """
    pool = concatenate_datasets(list(clients.values()))
    held, _ = hold_out_splits(np.asarray(pool["label"]), sizes, seed)
    taken = np.concatenate([np.empty(0, dtype=np.int64), *held.values()])
    kept: dict[str, Dataset] = {}
    start = 0
    for name, rows in clients.items():
        own = np.setdiff1d(np.arange(start, start + len(rows)), taken)
        if not len(own):
            raise ValueError(
                f"All {len(rows)} rows of client {name!r} went to {' and '.join(held)}, and it has none to train on: "
                "lower their sizes, give the client more rows, or the server files of its own."
            )
        kept[name] = rows.select(own - start)
        start += len(rows)
    return kept, {name: pool.select(rows) for name, rows in held.items()}
