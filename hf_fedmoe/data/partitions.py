"""Partitions of a labelled pool into clients, as row indices and nothing else.

Every function is pure numpy, takes the labels (or ids) of the pool that is to be divided, and returns one sorted
`int64` array of row indices per client. The arrays are disjoint, and the same seed gives the same bits. Rows that must
not reach any client (reserved set, validation, test) are held out first: see [`hold_out`], [`hold_out_ids`] and
[`~data.FederatedDataset.split`].
"""

from collections.abc import Sequence
from heapq import heapify, heapreplace

import numpy as np


MAX_DIRICHLET_DRAWS = 1000


def iid(num_rows: int, num_clients: int, seed: int = 0, client_size: int | None = None) -> list[np.ndarray]:
    """
    Deals shuffled rows to clients, so that every client sees the same distribution.

    Args:
        num_rows (`int`): Rows in the pool.
        num_clients (`int`): Number of clients M.
        seed (`int`, *optional*, defaults to 0): Seed of the shuffle.
        client_size (`int`, *optional*): Rows for each client; what is left over goes to nobody. By default all rows
            are dealt, and sizes differ by at most one.

    Returns:
        `list[np.ndarray]`: M sorted index arrays.

    Raises:
        ValueError: When there are fewer rows than the clients need.
    """
    check_num_clients(num_clients)
    needed = num_clients * (1 if client_size is None else client_size)
    if client_size is not None and client_size < 1:
        raise ValueError(f"client_size is {client_size}, but every client needs at least one row.")
    if num_rows < needed:
        raise ValueError(
            f"{num_clients} clients need {needed} rows, but num_rows is {num_rows}. Ask for fewer clients or a "
            "smaller client_size."
        )
    order = np.random.default_rng(seed).permutation(num_rows)
    if client_size is not None:
        order = order[:needed]
    return [np.sort(part) for part in np.array_split(order, num_clients)]


def dirichlet(
    labels: Sequence[int] | np.ndarray,
    num_clients: int,
    alpha: float,
    seed: int = 0,
    min_size: int = 1,
    num_groups: int | None = None,
) -> list[np.ndarray]:
    """
    Label skew by a Dirichlet draw: each class is divided over the clients in proportions drawn from Dir(alpha).

    Small `alpha` gives clients of few classes and very different sizes, large `alpha` approaches IID. All rows are
    used.

    Args:
        labels (`Sequence[int]`, shape `[N]`): Class of each row.
        num_clients (`int`): Number of clients M.
        alpha (`float`): Concentration, above 0. Published settings lie between 0.1 and 1.
        seed (`int`, *optional*, defaults to 0): Seed of the proportions and of the order of rows.
        min_size (`int`, *optional*, defaults to 1): Proportions are drawn again until every client has at least this
            many rows.
        num_groups (`int`, *optional*): When given, the classes are shuffled into this many groups of about equal
            number, and all classes of a group are divided in the same proportions (pFedMM's split: 3 groups on
            CIFAR-10). By default each class has proportions of its own.

    Returns:
        `list[np.ndarray]`: M sorted index arrays that cover all rows.

    Raises:
        ValueError: When `alpha` is not positive, when no draw gave every client `min_size` rows, or when `num_groups`
            is not between 1 and the number of classes.
    """
    labels_N = as_labels(labels)
    check_num_clients(num_clients)
    if not alpha > 0:
        raise ValueError(
            f"alpha is {alpha}, but a Dirichlet concentration must be above 0 (0.1 is strong skew, 100 is nearly IID)."
        )
    _check_enough_rows(len(labels_N), num_clients, min_size)
    classes, class_counts_C = np.unique(labels_N, return_counts=True)
    rng = np.random.default_rng(seed)
    group_C = np.arange(len(classes))
    if num_groups is not None:
        if not 1 <= num_groups <= len(classes):
            raise ValueError(
                f"num_groups is {num_groups}, but {len(classes)} classes make 1 to {len(classes)} groups. Leave it "
                "out to draw for each class by itself."
            )
        group_C = rng.permutation(group_C % num_groups)

    smallest = 0
    for _ in range(MAX_DIRICHLET_DRAWS):
        shares_GM = rng.dirichlet(np.full(num_clients, float(alpha)), size=group_C.max() + 1)
        cuts_CM = np.rint(np.cumsum(shares_GM[group_C], axis=1) * class_counts_C[:, None]).astype(np.int64)
        cuts_CM[:, -1] = class_counts_C  # the cumulative sum ends at 1 only up to rounding
        sizes_M = np.diff(cuts_CM, axis=1, prepend=0).sum(axis=0)
        smallest = max(smallest, int(sizes_M.min()))
        if sizes_M.min() >= min_size:
            break
    else:
        raise ValueError(
            f"In {MAX_DIRICHLET_DRAWS} Dirichlet draws with alpha {alpha} the smallest of {num_clients} clients never "
            f"had more than {smallest} rows, but min_size is {min_size}. Raise alpha, or lower num_clients or "
            "min_size."
        )

    parts: list[list[np.ndarray]] = [[] for _ in range(num_clients)]
    for label, cuts_M in zip(classes, cuts_CM, strict=True):
        rows = rng.permutation(np.flatnonzero(labels_N == label))
        for part, chunk in zip(parts, np.split(rows, cuts_M[:-1]), strict=True):
            part.append(chunk)
    return [np.sort(np.concatenate(part)) for part in parts]


def natural(
    ids: Sequence | np.ndarray,
    num_clients: int | None = None,
    seed: int = 0,
    min_size: int = 1,
    max_size: int | None = None,
) -> list[np.ndarray]:
    """
    Clients as the data has them: by user, writer, shop, department.

    Args:
        ids (`Sequence`, shape `[N]`): Who each row belongs to; strings or integers.
        num_clients (`int`, *optional*): When given, whole ids are grouped into this many clients of about equal size
            (the largest id goes first, each to the client that is smallest so far). By default every id is one client,
            in sorted order of ids.
        seed (`int`, *optional*, defaults to 0): Order in which ids of equal size are grouped, and which rows
            `max_size` keeps. Unused without either.
        min_size (`int`, *optional*, defaults to 1): Without `num_clients`, ids with fewer rows are left out, as is
            usual for data by user. With it, no id is left out, and a group below `min_size` is an error.
        max_size (`int`, *optional*): A client keeps at most this many of its rows, drawn uniformly; the others go to
            nobody. It bounds what a run costs.

    Returns:
        `list[np.ndarray]`: Sorted index arrays; no id is split between two of them.

    Raises:
        ValueError: When ids are missing, too few for `num_clients`, or too small for `min_size`, or when `max_size`
            is below `min_size`.
    """
    if max_size is not None and max_size < max(min_size, 1):
        raise ValueError(
            f"max_size is {max_size}, but a client has at least {max(min_size, 1)} rows (min_size is {min_size}). "
            "Raise max_size or lower min_size."
        )
    names, owner_N = _number_ids(ids)
    sizes_I = np.bincount(owner_N, minlength=len(names))
    rng = np.random.default_rng(seed)
    rows_by_id = np.split(np.argsort(owner_N, kind="stable"), np.cumsum(sizes_I)[:-1])

    if num_clients is None:
        clients = [rows.astype(np.int64) for rows in rows_by_id if len(rows) >= max(min_size, 1)]
        if not clients:
            raise ValueError(
                f"None of the {len(names)} ids has min_size = {min_size} rows (the largest has "
                f"{sizes_I.max(initial=0)}). Lower min_size, or give num_clients to group ids."
            )
        return _keep_at_most(clients, max_size, rng)

    check_num_clients(num_clients)
    if len(names) < num_clients:
        raise ValueError(
            f"num_clients is {num_clients}, but there are only {len(names)} different ids and an id is never split. "
            f"Ask for at most {len(names)} clients."
        )
    order_I = rng.permutation(len(names))
    order_I = order_I[np.argsort(-sizes_I[order_I], kind="stable")]
    heap = [(0, client) for client in range(num_clients)]
    heapify(heap)
    groups: list[list[np.ndarray]] = [[] for _ in range(num_clients)]
    for index in order_I:
        size, client = heap[0]
        groups[client].append(rows_by_id[index])
        heapreplace(heap, (size + int(sizes_I[index]), client))
    if heap[0][0] < min_size:
        raise ValueError(
            f"Grouping {len(names)} ids into {num_clients} clients leaves client {heap[0][1]} with {heap[0][0]} rows, "
            f"but min_size is {min_size}. Lower num_clients or min_size."
        )
    clients = [np.sort(np.concatenate(group)).astype(np.int64) for group in groups]
    return _keep_at_most(clients, max_size, rng)


def natural_by_name(
    ids: Sequence | np.ndarray, seed: int = 0, min_size: int = 1, max_size: int | None = None
) -> dict[str, np.ndarray]:
    """
    Divides as [`natural`], one client for each id, and names clients by their ids.

    Returns:
        `dict[str, np.ndarray]`: Sorted index arrays by id.
    """
    ids = ids[:]
    return {str(ids[rows[0]]): rows for rows in natural(ids, None, seed, min_size, max_size)}


def shards(
    labels: Sequence[int] | np.ndarray, num_clients: int, shards_per_client: int = 2, seed: int = 0
) -> list[np.ndarray]:
    """
    Pathological label skew: rows sorted by label are cut into equal shards, and each client gets `shards_per_client`
    of them.

    A client so sees about `shards_per_client` classes (McMahan et al., 2017). All rows are used.

    Args:
        labels (`Sequence[int]`, shape `[N]`): Class of each row.
        num_clients (`int`): Number of clients M.
        shards_per_client (`int`, *optional*, defaults to 2): Shards dealt to each client.
        seed (`int`, *optional*, defaults to 0): Order of rows within a class, and who gets which shard.

    Returns:
        `list[np.ndarray]`: M sorted index arrays that cover all rows.

    Raises:
        ValueError: When there are fewer rows than shards.
    """
    labels_N = as_labels(labels)
    check_num_clients(num_clients)
    if shards_per_client < 1:
        raise ValueError(f"shards_per_client is {shards_per_client}, but every client needs at least one shard.")
    _check_enough_rows(len(labels_N), num_clients, shards_per_client)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels_N))
    order = order[np.argsort(labels_N[order], kind="stable")]
    num_shards = num_clients * shards_per_client
    pieces = np.array_split(order, num_shards)
    dealt = rng.permutation(num_shards).reshape(num_clients, shards_per_client)
    return [np.sort(np.concatenate([pieces[shard] for shard in hand])) for hand in dealt]


def predominant(
    labels: Sequence[int] | np.ndarray,
    num_clients: int,
    examples_per_client: int,
    share: float | tuple[float, float] = (0.55, 0.65),
    seed: int = 0,
    balanced_rest: bool = False,
) -> list[np.ndarray]:
    """
    One class predominates at each client: client c has mostly class c mod C, and some of all the others.

    This is the split of the Fed-MoE paper's Yelp and SENT-140 experiments. Every client has exactly
    `examples_per_client` rows, drawn without replacement over all clients; rows that are not needed go to nobody.

    Args:
        labels (`Sequence[int]`, shape `[N]`): Class of each row. C is the number of different classes among them.
        num_clients (`int`): Number of clients M.
        examples_per_client (`int`): Rows for each client.
        share (`float` or `tuple[float, float]`, *optional*, defaults to `(0.55, 0.65)`): Share of the predominant
            class, or an interval from which each client's share is drawn uniformly.
        seed (`int`, *optional*, defaults to 0): Seed of the shares and of the rows.
        balanced_rest (`bool`, *optional*, defaults to `False`): Whether the other classes have equal parts of the
            rest. By default they have parts in proportion to their frequency in `labels`.

    Returns:
        `list[np.ndarray]`: M sorted index arrays of `examples_per_client` rows.

    Raises:
        ValueError: When the data runs out of a class: names each such class, how many rows are needed, and how many
            there are.
    """
    labels_N = as_labels(labels)
    check_num_clients(num_clients)
    low, high = (share, share) if isinstance(share, int | float) else share
    if not 0 < low <= high <= 1:
        raise ValueError(
            f"share is {share}, but must be a number in (0, 1] or an increasing interval (low, high) within it."
        )
    if examples_per_client < 1:
        raise ValueError(f"examples_per_client is {examples_per_client}, but every client needs at least one row.")
    classes, available_C = np.unique(labels_N, return_counts=True)
    num_classes = len(classes)
    if num_classes < 2:
        raise ValueError(
            f"labels has {num_classes} different classes, but a predominant class needs at least one other. Use iid."
        )

    rng = np.random.default_rng(seed)
    shares_M = rng.uniform(low, high, size=num_clients)
    # Rounding to whole rows must not leave the interval, where a whole number lies in it.
    fewest, most = np.ceil(low * examples_per_client - 1e-9), np.floor(high * examples_per_client + 1e-9)
    majority_M = np.rint(shares_M * examples_per_client)
    if fewest <= most:
        majority_M = np.clip(majority_M, fewest, most)
    counts_MC = np.zeros((num_clients, num_classes), dtype=np.int64)
    for client, majority in enumerate(majority_M.astype(np.int64)):
        weights_C = np.ones(num_classes) if balanced_rest else available_C.astype(float)
        weights_C[client % num_classes] = 0.0
        counts_MC[client] = apportion(examples_per_client - majority, weights_C)
        counts_MC[client, client % num_classes] = majority

    needed_C = counts_MC.sum(axis=0)
    if (needed_C > available_C).any():
        short = "; ".join(
            f"class {classes[c]}: {needed_C[c]} needed, {available_C[c]} available"
            for c in np.flatnonzero(needed_C > available_C)
        )
        fits = int(examples_per_client * (available_C / np.maximum(needed_C, 1)).min())
        raise ValueError(
            f"The data is too small for {num_clients} clients of examples_per_client = {examples_per_client} at share "
            f"{share}: {short}. Lower examples_per_client to about {fits}, lower num_clients or share, or hold out "
            "fewer rows."
        )
    parts: list[list[np.ndarray]] = [[] for _ in range(num_clients)]
    for c, label in enumerate(classes):
        rows = rng.permutation(np.flatnonzero(labels_N == label))
        for part, chunk in zip(parts, np.split(rows, np.cumsum(counts_MC[:, c]))[:-1], strict=True):
            part.append(chunk)
    return [np.sort(np.concatenate(part)) for part in parts]


def hold_out(
    labels: Sequence[int] | np.ndarray, size: int | float, seed: int | np.random.Generator = 0, stratify: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """
    Sets rows aside, before any client gets one.

    Args:
        labels (`Sequence[int]`, shape `[N]`): Class of each row.
        size (`int` or `float`): Number of rows, or their share when it is a float below 1.
        seed (`int` or `np.random.Generator`, *optional*, defaults to 0): Seed of the draw.
        stratify (`bool`, *optional*, defaults to `True`): Whether classes keep their proportions, with at least one
            row of every class as soon as `size` allows. `False` draws uniformly from all rows.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: The rows set aside and the rest, both sorted.

    Raises:
        ValueError: When `size` is negative, or leaves no rows.
    """
    labels_N = as_labels(labels)
    num_rows = len(labels_N)
    if size < 0 or (isinstance(size, float) and size >= 1):
        raise ValueError(f"size is {size}, but must be a whole number of rows or a share in [0, 1).")
    count = round(size * num_rows) if isinstance(size, float) else int(size)
    if count >= num_rows and count > 0:
        raise ValueError(f"Holding out {count} of {num_rows} rows leaves none for the clients. Lower the size.")
    order = np.random.default_rng(seed).permutation(num_rows)
    if stratify and count:
        classes, counts_C = np.unique(labels_N, return_counts=True)
        floor_C = np.ones_like(counts_C) if count >= len(classes) else np.zeros_like(counts_C)
        taken_C = floor_C + apportion(
            count - floor_C.sum(), counts_C * (count / num_rows) - floor_C, limits=counts_C - floor_C
        )
        position_N = np.searchsorted(classes, labels_N[order])
        held = np.concatenate([order[position_N == c][:taken] for c, taken in enumerate(taken_C)])
    else:
        held = order[:count]
    rest = np.setdiff1d(order, held, assume_unique=True)
    return np.sort(held), np.sort(rest)


def hold_out_predominant(
    labels: Sequence[int] | np.ndarray, size: int, share: float, seed: int | np.random.Generator = 0
) -> tuple[np.ndarray, np.ndarray]:
    """
    Sets rows aside of which one class, drawn at random, has a given share: a reserved set that is not what the model
    will meet (Fed-MoE, Figure 4).

    Args:
        labels (`Sequence[int]`, shape `[N]`): Class of each row.
        size (`int`): Number of rows.
        share (`float`): Share of the class in them; the others are drawn uniformly from the other classes.
        seed (`int` or `np.random.Generator`, *optional*, defaults to 0): Seed of the draws.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: The rows set aside and the rest, both sorted.

    Raises:
        ValueError: When `share` is out of (0, 1], or no class has enough rows.
    """
    labels_N, rng = as_labels(labels), np.random.default_rng(seed)
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}, but must be above 0 and at most 1.")
    of_class = round(share * size)
    classes, counts_C = np.unique(labels_N, return_counts=True)
    large = classes[(counts_C >= of_class) & (len(labels_N) - counts_C >= size - of_class)]
    if len(large) == 0:
        raise ValueError(
            f"No class has {of_class} rows for a share of {share} of {size}: the largest has {counts_C.max()}. Lower "
            "the share or the size."
        )
    order = rng.permutation(len(labels_N))
    is_class_N = labels_N[order] == rng.choice(large)
    held = np.concatenate([order[is_class_N][:of_class], order[~is_class_N][: size - of_class]])
    return np.sort(held), np.setdiff1d(order, held, assume_unique=True)


def hold_out_ids(ids: Sequence | np.ndarray, size: int | float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """
    Sets all rows of some ids aside, so that a test set has people (writers, users) who are at no client.

    Args:
        ids (`Sequence`, shape `[N]`): Who each row belongs to; strings or integers.
        size (`int` or `float`): Number of ids, or their share when it is a float below 1.
        seed (`int`, *optional*, defaults to 0): Seed of the draw, in which all ids are equally likely.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: The rows set aside and the rest, both sorted; no id has rows in both.

    Raises:
        ValueError: When ids are missing, or when `size` is negative, a share of less than one id, or leaves no ids.
    """
    names, owner_N = _number_ids(ids)
    if size < 0 or (isinstance(size, float) and size >= 1):
        raise ValueError(f"size is {size}, but must be a whole number of ids or a share in [0, 1).")
    count = round(size * len(names)) if isinstance(size, float) else int(size)
    if size > 0 and count == 0:
        raise ValueError(f"size is {size}, but this share of {len(names)} ids is none. Raise it, or give a number.")
    if count >= len(names) and count > 0:
        raise ValueError(f"Holding out {count} of {len(names)} ids leaves none for the clients. Lower the size.")
    held_I = np.random.default_rng(seed).permutation(len(names))[:count]
    is_held_N = np.isin(owner_N, held_I)
    return np.flatnonzero(is_held_N).astype(np.int64), np.flatnonzero(~is_held_N).astype(np.int64)


def apportion(total: int, weights: np.ndarray, limits: np.ndarray | None = None) -> np.ndarray:
    """
    Divides `total` whole units in proportion to `weights`, by largest remainders.

    Args:
        total (`int`): Units to divide.
        weights (`np.ndarray`, shape `[C]`): Proportions; negative ones count as 0.
        limits (`np.ndarray`, shape `[C]`, *optional*): The most that each entry can take; what exceeds it goes to the
            others.

    Returns:
        `np.ndarray`: Shape `[C]`, sum `total`.
    """
    weights = np.maximum(np.asarray(weights, dtype=float), 0.0)
    limits = np.full(len(weights), total) if limits is None else np.asarray(limits)
    ideal = total * weights / weights.sum() if weights.sum() else np.full(len(weights), total / len(weights))
    units = np.minimum(np.floor(ideal).astype(np.int64), limits)
    while (left := int(total - units.sum())) > 0:
        remainders = np.where(units < limits, ideal - units, -np.inf)
        best = np.argsort(-remainders, kind="stable")[: min(left, int((units < limits).sum()))]
        units[best] += 1
    return units


def as_labels(labels: Sequence[int] | np.ndarray) -> np.ndarray:
    """Labels as an integer array `[N]`."""
    labels_N = np.asarray(labels[:])  # sliced, because iterating over a lazy `datasets` column reads it row by row
    if labels_N.ndim != 1 or (labels_N.size and not np.issubdtype(labels_N.dtype, np.integer)):
        raise ValueError(
            f"labels must be a flat sequence of integers, got shape {labels_N.shape} and type {labels_N.dtype}. For "
            "string labels use dataset.class_encode_column(...) first."
        )
    return labels_N


def check_num_clients(num_clients: int) -> None:
    """Raises a `ValueError` when there is no client."""
    if num_clients < 1:
        raise ValueError(f"num_clients is {num_clients}, but at least one client is needed.")


def _number_ids(ids: Sequence | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different ids in sorted order, and for each row the number of its id among them."""
    ids_N = np.asarray(ids[:])
    missing = sum(value is None or value != value for value in ids_N.tolist())
    if missing:
        raise ValueError(
            f"ids has {missing} missing values among {len(ids_N)} rows, so these rows belong to nobody. Filter them "
            "out first, for example dataset.filter(lambda row: row['user_id'] is not None)."
        )
    return np.unique(ids_N, return_inverse=True)


def _keep_at_most(clients: list[np.ndarray], max_size: int | None, rng: np.random.Generator) -> list[np.ndarray]:
    if max_size is None:
        return clients
    return [np.sort(rng.choice(rows, max_size, replace=False)) if len(rows) > max_size else rows for rows in clients]


def _check_enough_rows(num_rows: int, num_clients: int, min_size: int) -> None:
    if num_rows < num_clients * max(min_size, 1):
        raise ValueError(
            f"{num_clients} clients of at least {max(min_size, 1)} rows need {num_clients * max(min_size, 1)} rows, "
            f"but there are {num_rows}. Lower num_clients or the size of a client."
        )
