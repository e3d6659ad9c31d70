"""
Client-level differential privacy: the mean of a round as a noised sum of updates whose norms are bounded.

McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models", Algorithm 1 with weights of 1 and the
estimator of a fixed denominator; the norm fixed, or moved to a quantile of the updates' norms (Andrew et al. 2021,
"Differentially Private Learning with Adaptive Clipping", Algorithm 1).

Shape suffixes: P elements of a model's row, k sound uploads of a round.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..weights import fuse_models_
from .contract import Server, Strategy, Uploads
from .filters import shorten_
from .noise import Normals
from .soundness import BrokenPromiseError
from .uploads import AverageableUploads, NotKeptError


# In `server.tensors`, and so in checkpoints: the norm to which updates are shortened, where it moves.
NORM = "privacy.clipping_norm"


@dataclass
class FixedNorm:
    """
    Bounds updates by the same norm in every round.

    Args:
        start (`float`): The norm.
    """

    start: float

    def norm(self, server: Server) -> float:
        """Returns the norm of this round."""
        return self.start

    def noise_of_updates(self, noise_multiplier: float) -> float:
        """Returns the noise on updates, in norms, that leaves all that is released with the noise multiplier."""
        return noise_multiplier

    def move(self, server: Server, norms: Sequence[float], is_noised: bool, normals: Normals) -> dict[str, float]:
        """Moves the norm after a round whose updates had these; returns what there is to log of it."""
        return {}


@dataclass
class AdaptiveNorm(FixedNorm):
    """
    Moves the norm C to a quantile of the updates' norms, C <- C exp(-rate (share - quantile)), by the share that was
    not above it. Noise of deviation `expected / 20` is added to their count, and that on updates grows by what this
    takes of the budget: z_updates = (z^-2 - (2 deviation)^-2)^-1/2.

    Args:
        start (`float`): The norm of the first round.
        quantile (`float`): Which share of updates is to be left as it is.
        expected (`int`): Participants of a round, on average.
        rate (`float`, *optional*, defaults to 0.2): How fast it moves.
    """

    quantile: float
    expected: int
    rate: float = 0.2

    @property
    def count_deviation(self) -> float:
        """The deviation of the noise on the count."""
        return self.expected / 20

    def norm(self, server: Server) -> float:
        moved = server.tensors.get(NORM)
        return self.start if moved is None else moved.item()

    def noise_of_updates(self, noise_multiplier: float) -> float:
        if noise_multiplier == 0:
            return 0.0
        return (noise_multiplier**-2 - (2 * self.count_deviation) ** -2) ** -0.5

    def move(self, server: Server, norms: Sequence[float], is_noised: bool, normals: Normals) -> dict[str, float]:
        norm = self.norm(server)
        # Of each participant 1/2 or -1/2: half as sensitive as a count of 1 or 0.
        count = sum(0.5 if own <= norm else -0.5 for own in norms)
        if is_noised:
            count += self.count_deviation * normals(1).item()
        moved = norm * math.exp(-self.rate * (count / self.expected + 0.5 - self.quantile))
        server.tensors[NORM] = torch.tensor(moved, dtype=torch.float64)
        return {"clipping_norm": moved}


class PlainMean:
    """Leaves the uploads of a round as they are, and each method to what it makes of them."""

    may_be_empty = False

    def uploads(self, uploads: Uploads, round_index: int) -> Uploads:
        """Returns what the method sees of the uploads of a round."""
        return uploads


@dataclass
class GaussianMean(PlainMean):
    """
    Gives methods that only average the private mean of a round in the place of that of the uploads.

    Args:
        server ([`Server`]), strategy ([`Strategy`]): Of the federation.
        expected (`int`): Participants of a round, on average, by whose number the sum is divided.
        num_clients (`int`): M, by which it is divided for methods that average over those who are absent too.
        noise_multiplier (`float`): z, the deviation of the noise on the sum in norms of an update.
        clipping ([`FixedNorm`]): To what norm updates are shortened.
        noise (`Callable`): From a round to its noise, [`system_normals`] or [`seeded_normals`].
        before_release (`Callable`): Called before anything of a round leaves the mechanism.
    """

    server: Server
    strategy: Strategy
    expected: int
    num_clients: int
    noise_multiplier: float
    clipping: FixedNorm
    noise: Callable[[int], Normals]
    before_release: Callable[[], None]
    may_be_empty = True

    def uploads(self, uploads: Uploads, round_index: int) -> "PrivateUploads":
        """Shortens the updates in this process's uploads, in place; returns what the method sees of the round."""
        server, layout = self.server, self.server.layout
        shared = self.strategy.shared(server, round_index)
        names = [slot.name for slot in layout.slots if shared is None or slot.name in shared]
        start_P = self._start(uploads.clients)
        rows_kP = uploads._rows()
        norm = self.clipping.norm(server)
        norms = [shorten_(row_P, start_P, layout, names, norm) for row_P in rows_kP]
        return PrivateUploads(self, uploads.clients, rows_kP, norms, start_P, names, self.noise(round_index))

    def _start(self, clients: list[int]) -> Tensor:
        """Returns the row that all participants started from."""
        starts = [self.strategy.download(self.server, client, None) for client in clients]
        if not all(torch.equal(start_P, starts[0]) for start_P in starts):
            fault = "`download` gives participants different rows, and a private mean is that of the changes of one"
            raise BrokenPromiseError(self.strategy, fault)
        return (starts[0] if starts else self.server.bank_SP[0]).clone()


class PrivateUploads(AverageableUploads):
    """
    [`AverageableUploads`] that show nothing but one private mean: everybody counts alike, and nobody's metrics are
    there.

    Args:
        mean ([`GaussianMean`]): Makes it.
        clients (`list[int]`), rows_kP (`Tensor` of shape `[k, P]`): The uploads, shortened.
        norms (`list[float]`): Of the updates, as they were sent.
        start_P (`Tensor` of shape `[P]`): The row that all started from.
        names (`list[str]`): The tensors that travelled.
        normals (`Callable`): The noise of the round.
    """

    def __init__(
        self,
        mean: GaussianMean,
        clients: list[int],
        rows_kP: Tensor,
        norms: list[float],
        start_P: Tensor,
        names: list[str],
        normals: Normals,
    ):
        super().__init__(clients, rows_kP, [], torch.ones(len(clients), device=rows_kP.device))
        self.mean, self.norms, self.start_P, self.names, self.normals = mean, norms, start_P, names, normals
        self.is_released = False

    def sum_of(self, name: str) -> Tensor:
        raise NotKeptError("`uploads.sum_of` is not there in a private run, where updates of the model are bounded")

    @torch.no_grad()
    def average_into_(self, server: Server, num_examples: int | None = None) -> dict[str, float]:
        """
        bank[0] <- bank[0] + (sum_c clipped update of c + N(0, (z S)^2)) / expected; the other arguments and what it
        returns are those of [`Uploads.average_into_`], with all clients in the place of all examples.
        """
        mean, rows_kP = self.mean, self._rows()
        if self.is_released or not torch.equal(server.bank_SP[0], self.start_P):
            raise NotKeptError(
                "in a private run `uploads.average_into_` is there once, into the row that participants started from"
            )
        self.is_released = True
        norm, z = mean.clipping.norm(server), mean.clipping.noise_of_updates(mean.noise_multiplier)
        divisor = mean.expected if num_examples is None else mean.num_clients
        mean.before_release()
        # The mean of clipped rows, of which as many stay away as there are fewer than expected: without noise and
        # with everybody there the bits of the plain mean.
        weights_1k = torch.ones(1, len(rows_kP), device=rows_kP.device) / divisor
        keep_1 = torch.full((1,), (divisor - len(rows_kP)) / divisor, device=rows_kP.device)
        fuse_models_(server.bank_SP[:1], rows_kP, weights_1k, keep_1, server.layout)
        if z:
            views = server.layout.views(server.bank_SP[0])
            for tensor in (views[name] for name in self.names):
                # Not waited for: the next is drawn meanwhile.
                noise = self.normals(tensor.numel()).view_as(tensor).to(tensor, non_blocking=True)
                tensor.add_(noise, alpha=z * norm / divisor)
        return mean.clipping.move(server, self.norms, z > 0, self.normals)
