"""
Filters, through which a payload goes on its way between server and client. They alone change what travels, and the
bytes that are counted of it.

Shape suffixes: P elements of a model's row, U elements of an update.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..weights import (
    Codec,
    Payload,
    StateLayout,
    compress_upload,
    fit_rank_,
    keep_private_,
    sizes_at_rank,
    widen_rank_,
)
from .contract import ClientTask, Server, Strategy
from .randomness import Stream, seed_of


# What stays with a client of updates that were compressed.
RESIDUAL = "residual_U"
# In `Payload.sizes`, in the place of the tensors that were encoded.
ENCODED = "encoded update"


class Filter:
    """A step on the way between server and client. It changes payloads in place; this one changes nothing."""

    def download(self, sent: Payload, client: int, round_index: int) -> None:
        """Changes what a client is sent."""

    def upload(self, sent: Payload, task: ClientTask) -> dict[str, Tensor]:
        """Changes what a client sends; returns what stays with it if the upload is accepted."""
        return {}


class Ranks(Filter):
    """
    Sends clients LoRA adapters of their own ranks.

    Args:
        server ([`Server`]), strategy ([`Strategy`]): Of the federation.
        ranks (`list[int]`, *optional*): Of the clients, over and over; that of the server's adapters if left out.
        seed (`int`): Of directions of adapters that start anew.
    """

    def __init__(self, server: Server, strategy: Strategy, ranks: list[int] | None, seed: int):
        self.server, self.strategy, self.ranks = server, strategy, ranks
        # One start for all: averages need it, and so does what a client remembers of its entries.
        self.seed = seed_of(seed, Stream.ADAPTER_START)

    def rank(self, client: int) -> int | None:
        """Returns the rank of a client's adapters, `None` for that of the server's."""
        return None if self.ranks is None else self.ranks[client % len(self.ranks)]

    def download(self, sent: Payload, client: int, round_index: int) -> None:
        sent.row_P = sent.row_P.clone()
        fit_rank_(sent.row_P, self.server.layout, self.rank(client), self.seed)
        self.weigh(sent, client)

    def upload(self, sent: Payload, task: ClientTask) -> dict[str, Tensor]:
        rank = self.rank(task.client)
        if rank is not None:
            start_P = self.strategy.download(self.server, task.client, task.kept.get("row_P"))
            widen_rank_(sent.row_P, start_P.to(sent.row_P.device), self.server.layout, rank)
        self.weigh(sent, task.client)
        return {}

    def weigh(self, sent: Payload, client: int) -> None:
        """Sets the sizes of the adapters that a client sends or receives."""
        rank = self.rank(client)
        if rank is not None:
            sent.sizes |= sizes_at_rank(self.server.layout, rank)


class Private(Filter):
    """
    Keeps what a method does not share where it is.

    Args:
        server ([`Server`]), strategy ([`Strategy`]): Of the federation.
    """

    def __init__(self, server: Server, strategy: Strategy):
        self.server, self.strategy = server, strategy

    def download(self, sent: Payload, client: int, round_index: int) -> None:
        self._weigh(sent, round_index)

    def upload(self, sent: Payload, task: ClientTask) -> dict[str, Tensor]:
        shared = self._weigh(sent, task.round_index)
        if shared is not None:
            known = Payload(self.server.bank_SP[0], self.server.integers[0])
            keep_private_(sent, known, self.server.layout, shared)
        return {}

    def _weigh(self, sent: Payload, round_index: int) -> frozenset[str] | None:
        """Takes what is not shared out of the sizes; returns the names of what is, `None` if that is all."""
        shared = self.strategy.shared(self.server, round_index)
        if shared is None:
            return None
        sent.sizes = {name: size for name, size in sent.sizes.items() if name in shared}
        return frozenset(shared)


class Clip(Filter):
    """
    Shortens updates, the changes of parameters that travel, to a norm.

    Running statistics of normalisation layers are left as they are: a client can measure them, not choose them.

    Args:
        layout ([`StateLayout`]): Of the rows.
        max_norm (`float`): Above 0.
    """

    def __init__(self, layout: StateLayout, max_norm: float):
        self.layout, self.max_norm = layout, max_norm

    def upload(self, sent: Payload, task: ClientTask) -> dict[str, Tensor]:
        names = [name for name in self.layout.sizes if name in sent.sizes and name not in self.layout.statistics]
        shorten_(sent.row_P, task.received_P, self.layout, names, self.max_norm)
        return {}


@torch.no_grad()
def shorten_(row_P: Tensor, received_P: Tensor, layout: StateLayout, names: Sequence[str], max_norm: float) -> float:
    """
    Shortens the change of some tensors of a row to a norm, in place; returns what its norm was. A change that is not
    finite stays as it is.
    """
    trained, received = layout.views(row_P), layout.views(received_P)
    updates = [trained[name] - received[name] for name in names]
    if not updates:
        return 0.0
    # In float64, where no squares of what is finite overflow.
    norm = torch.stack(torch._foreach_norm(updates, dtype=torch.float64)).norm().item()
    if norm > max_norm and math.isfinite(norm):
        for name, update in zip(names, updates, strict=True):
            torch.add(received[name], update, alpha=max_norm / norm, out=trained[name])
    return norm


class Compress(Filter):
    """
    Sends updates in a lossy code.

    Args:
        layout ([`StateLayout`]): Of the rows.
        codec ([`~weights.Codec`]): The code.
    """

    def __init__(self, layout: StateLayout, codec: Codec):
        self.layout, self.codec = layout, codec

    def upload(self, sent: Payload, task: ClientTask) -> dict[str, Tensor]:
        residual_U = task.kept.get(RESIDUAL)
        names = self.layout.sizes.keys() & sent.sizes.keys()
        if names:
            sent.encoded, residual_U = compress_upload(
                self.codec, self.layout, sent.row_P, task.received_P, residual_U, names
            )
            whole = self.layout.statistics & names
            sent.sizes = {name: size for name, size in sent.sizes.items() if name not in self.layout.sizes}
            num_bytes = sum(tensor.nbytes for tensor in sent.encoded.values())
            sent.sizes[ENCODED] = num_bytes + sum(self.layout.sizes[name] for name in whole)
        return {} if residual_U is None else {RESIDUAL: residual_U}


def make_filters(
    server: Server,
    strategy: Strategy,
    seed: int,
    client_ranks: list[int] | None = None,
    max_update_norm: float | None = None,
    codec: Codec | None = None,
) -> list[Filter]:
    """
    Returns the filters of a federation in the order in which an upload goes through them.

    Args:
        server ([`Server`]), strategy ([`Strategy`]), seed (`int`): Of the federation.
        client_ranks (`list[int]`, *optional*): Ranks of the clients' LoRA adapters, over and over.
        max_update_norm (`float`, *optional*): To what norm updates are shortened.
        codec ([`~weights.Codec`], *optional*): How uploads are compressed.
    """
    filters: list[Filter] = [Ranks(server, strategy, client_ranks, seed)] if server.layout.lora else []
    filters.append(Private(server, strategy))
    if max_update_norm is not None:
        filters.append(Clip(server.layout, max_update_norm))
    if codec is not None:
        filters.append(Compress(server.layout, codec))
    return filters
