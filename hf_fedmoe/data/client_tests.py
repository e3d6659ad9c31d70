"""Test rows of the clients' own, and clients that no round ever sees."""

import copy

import numpy as np

from .federated_dataset import FederatedDataset


def hold_out_client_tests(
    data: FederatedDataset, test_share: float = 0.2, unseen_share: float = 0.0, seed: int = 0
) -> FederatedDataset:
    """
    Divides the rows of every client into those it trains on and its own test set, and sets clients aside that take
    part in no round.

    The clients that stay are numbered anew in their old order, 0 to M - 1; the unseen ones follow them. Server-side
    splits and the names of clients stay as they are.

    Args:
        data ([`FederatedDataset`]): Its clients' rows are divided, uniformly at random.
        test_share (`float`, *optional*, defaults to 0.2): Share of each client's rows in its test set, rounded, at
            least one row.
        unseen_share (`float`, *optional*, defaults to 0.0): Share of the clients that are set aside, rounded, at least
            one if it is above 0.
        seed (`int`, *optional*, defaults to 0): Seed of both draws. A client's rows do not depend on `unseen_share`.

    Returns:
        [`FederatedDataset`]: Over the same pool.

    Raises:
        ValueError: When `data` has such rows or clients already, a share is out of range, no client would stay, or a
            client has a single row.
    """
    if data.client_test_indices or data.unseen_indices:
        raise ValueError("`data` has client tests or unseen clients already: hold them out once.")
    if not 0 < test_share < 1:
        raise ValueError(f"`test_share` is {test_share}: give a share in (0, 1), 0.2 tests on every fifth row.")
    if not 0 <= unseen_share < 1:
        raise ValueError(f"`unseen_share` is {unseen_share}: give a share in [0, 1), 0 for no unseen clients.")
    num_unseen = max(1, round(unseen_share * data.num_clients)) if unseen_share else 0
    if num_unseen >= data.num_clients:
        raise ValueError(
            f"`unseen_share` is {unseen_share}, which leaves none of {data.num_clients} clients to train: lower it, "
            "or partition the data over more clients."
        )
    train, test = [], []
    for client, rows in enumerate(data.client_indices):
        if len(rows) < 2:
            raise ValueError(
                f"Client {data.client_name(client)} has {len(rows)} row, too few to divide into training and test: "
                "give it two or more (`min_size=2` of a partition), or hold none out."
            )
        count = min(len(rows) - 1, max(1, round(test_share * len(rows))))
        order = np.random.default_rng((seed, client)).permutation(rows)
        test.append(np.sort(order[:count]))
        train.append(np.sort(order[count:]))
    unseen = set(np.random.default_rng(seed).permutation(data.num_clients)[:num_unseen].tolist())
    seen = [client for client in range(data.num_clients) if client not in unseen]
    result = copy.copy(data)
    result.client_indices = [train[client] for client in seen]
    result.unseen_indices = [train[client] for client in sorted(unseen)]
    result.client_test_indices = [test[client] for client in [*seen, *sorted(unseen)]]
    if data.given_client_names is not None:
        result.given_client_names = [data.given_client_names[client] for client in [*seen, *sorted(unseen)]]
    return result
