"""Fewer rows of each client, for what only has to be tried."""

import copy

import numpy as np

from .federated_dataset import FederatedDataset


def with_fewer_rows(data: FederatedDataset, most: int) -> FederatedDataset:
    """
    Takes a few training rows of each client. The server's splits and clients' test rows stay.

    Args:
        data ([`FederatedDataset`]): Is left as it is.
        most (`int`): Rows of a client at most, taken at equal distances.

    Returns:
        [`FederatedDataset`]: Over the same pool.

    Raises:
        ValueError: When `most` is less than 1.
    """
    if most < 1:
        raise ValueError(f"`most` is {most}: leave every client at least 1 row.")
    result = copy.copy(data)
    result.client_indices = [_spread(rows, most) for rows in data.client_indices]
    return result


def _spread(rows: np.ndarray, most: int) -> np.ndarray:
    if len(rows) <= most:
        return rows
    return rows[np.linspace(0, len(rows) - 1, most).astype(np.int64)]
