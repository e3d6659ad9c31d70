"""The hooks in which federated methods differ. Everything else about a round is in `hf_fedmoe.federation`.

Shape suffixes: m participants of a round, P elements of a model's row, S rows of the server.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Subset
from transformers import PreTrainedModel, TrainingArguments

from ..data import ReservedSet
from ..models import as_expert
from ..weights import Payload, Reducer, StateLayout, fuse_integers, fuse_models_
from .captured_passes import CapturedPasses
from .local_training import LocalTrainer
from .objective import LocalObjective, has_own_loss


# From the step and an item to named tensors, see [`ServerStep.share`].
Work = Callable[["ServerStep", Any], dict[str, Tensor]]
# From the step, tensors of the main process and settings to what that process wants to know.
JointWork = Callable[["ServerStep", dict[str, Tensor], Any], Any]
# From the items of a loop and what it does to these items, see [`ServerStep`].
Track = Callable[[Collection, str], Iterable]


def untracked(items: Collection, what: str) -> Iterable:
    """Returns the items of a loop that nobody watches."""
    return items


@dataclass
class Server:
    """
    The state of the server between rounds.

    Args:
        model ([`~transformers.PreTrainedModel`]): What is evaluated, saved and pushed.
        worker (`nn.Module`): One client model on the training device: clients train in it, the server probes with it.
        layout ([`StateLayout`]): Of a client model.
        bank_SP (`Tensor` of shape `[S, P]`): The server's models as rows. `model`'s tensors are views of them.
        integers (`list[dict[str, Tensor]]`): Integer buffers of each row.
        tensors (`dict[str, Tensor]`): Whatever else the strategy must find again after a resume.
        weight_decay (`float`): Of every optimizer that runs on the server, as on the clients.
        num_examples (`int`): Training examples of all clients together.
        cache (`dict[str, Any]`): What the strategy can compute again; gone after a resume.
    """

    model: PreTrainedModel
    worker: nn.Module
    layout: StateLayout
    bank_SP: Tensor
    integers: list[dict[str, Tensor]]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    weight_decay: float = 0.0
    num_examples: int = 0
    cache: dict[str, Any] = field(default_factory=dict)

    def beside_bank(self) -> Iterator[tuple[str, Tensor]]:
        """Gives what of the model's state is not in the bank and no frozen weight, with its names."""
        seen = {self.bank_SP.untyped_storage().data_ptr()}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            memory = tensor.untyped_storage().data_ptr()
            frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
            if not frozen and memory not in seen:
                seen.add(memory)
                yield name, tensor


@dataclass
class ServerStep:
    """
    The means of the server's step, besides what was uploaded. With several processes the main one takes the step,
    and has the others help by [`ServerStep.share`] and [`ServerStep.join`].

    Args:
        server ([`Server`]): Changed by the step.
        reserved ([`~data.ReservedSet`], *optional*): Each process has its own.
        round_index (`int`): The round, from 0; after the last one, how many there were.
        seed (`int`): Of everything random in it.
        track (`Callable`, *optional*): From the items of a loop that takes long, and what it does, to the same items,
            for a bar of progress: `for batch in step.track(batches, "Training the gate")`.
        gate_fit ([`~strategies.GateFit`], *optional*): By what all processes train a gate together, if they do.
        captured (`dict[nn.Module, CapturedPasses]`, *optional*): Passes of the models that the server trains, round
            after round, if these are replayed as CUDA graphs.
    """

    server: Server
    reserved: ReservedSet | None
    round_index: int
    seed: int
    track: Track = untracked
    gate_fit: Any = None
    captured: dict[nn.Module, CapturedPasses] | None = None

    def share(self, work: Work, items: Sequence[Any]) -> list[dict[str, Tensor]]:
        """
        Returns `work(step, item)` for each item, of which each process does some. It finds the models of the main
        process, and nothing else of the step; what it changes reaches that process in the returned tensors only.

        Args:
            work (`Callable`): A function of a module, so that all processes find it by its name.
            items (`Sequence`): What to do: small, and on the CPU.
        """
        return [work(self, item) for item in items]

    def join(self, work: JointWork, tensors: dict[str, Tensor], settings: Any) -> Any:
        """Returns `work(step, tensors, settings)`, which all processes do together, with the main one's models."""
        return work(self, tensors, settings)


class Uploads:
    """
    The sound uploads of one round.

    Args:
        clients (`list[int]`): The participants, in the order of the draw.
        rows_mP (`Tensor` of shape `[m, P]`): Their models.
        integers (`list[dict[str, Tensor]]`): Their integer buffers.
        num_examples_m (`Tensor` of shape `[m]`): Their training examples.
        metrics (`list[dict[str, float]]`, *optional*): What they report.
        probed (`list[Tensor]`, *optional*): What [`Strategy.probe`] found of each.
        tensors (`list[dict[str, Tensor]]`, *optional*): What each sent beside its model, [`Strategy.upload_tensors`].
    """

    # Fuses them; that of a [`Defence`] if there is one.
    fuse_: Reducer = staticmethod(fuse_models_)

    def __init__(
        self,
        clients: list[int],
        rows_mP: Tensor | None,
        integers: list[dict[str, Tensor]],
        num_examples_m: Tensor,
        metrics: Sequence[dict[str, float]] = (),
        probed: Sequence[Tensor] = (),
        tensors: Sequence[dict[str, Tensor]] = (),
    ):
        self.clients, self._rows_mP, self.integers, self.num_examples_m = clients, rows_mP, integers, num_examples_m
        self.metrics, self.probed, self._tensors = list(metrics), list(probed), list(tensors)

    @property
    def rows_mP(self) -> Tensor:
        """Their models, one in a row; for a method that `needs` "rows"."""
        return self._rows()

    def _rows(self) -> Tensor:
        assert self._rows_mP is not None  # or they are [`ShardedUploads`] or a [`MeanOfUploads`]
        return self._rows_mP

    @property
    def tensors(self) -> list[dict[str, Tensor]]:
        """The tensors that each sent beside its model; for a method that `needs` "rows" or "fusion"."""
        return self._tensors

    def sum_of(self, name: str) -> Tensor:
        """The sum of a tensor over all uploads that have it beside their models."""
        first, *others = (tensors[name] for tensors in self._tensors if name in tensors)
        total = first.clone()
        for tensor in others:
            total += tensor
        return total

    def by_client(self) -> Iterable[tuple[int, Tensor]]:
        """Gives the rows that are in this process with their clients: to tell who is at fault, not to compute with."""
        return () if self._rows_mP is None else zip(self.clients, self._rows_mP, strict=True)

    @property
    def weights_m(self) -> Tensor:
        """n_c / sum(n)."""
        return self.num_examples_m / self.num_examples_m.sum()

    def fuse_into_(self, server: Server, weights_Sm: Tensor, keep_S: Tensor) -> Tensor:
        """
        bank <- keep * bank + weights @ uploads; returns what [`fuse_models_`] does. For a method that `needs` "rows"
        or "fusion".
        """
        return self.fuse_(server.bank_SP, self._rows(), weights_Sm, keep_S, server.layout)

    def average_into_(self, server: Server, num_examples: int | None = None) -> dict[str, float]:
        """
        bank[0] <- sum_c n_c / n M_c (McMahan et al. 2017, Algorithm 1); returns what there is to log of it. n is what
        the participants have, or `num_examples`: what is missing then to a sum of 1 is the weight of bank[0] as it
        was.
        """
        sent = self.num_examples_m.sum()
        n = sent if num_examples is None else num_examples
        rows_mP, examples_m = self._summands()
        lost_S = self.fuse_(server.bank_SP[:1], rows_mP, (examples_m / n)[None], ((n - sent) / n)[None], server.layout)
        server.integers[0] = fuse_integers(self.integers, self.weights_m)
        return {"discarded_energy": lost_S.item()} if server.layout.lora else {}

    def _summands(self) -> tuple[Tensor, Tensor]:
        """The rows of the mean, and how many examples each stands for."""
        return self._rows(), self.num_examples_m


@dataclass
class ClientTask:
    """
    The means of a client for its training.

    Args:
        client (`int`): Its number.
        round_index (`int`): The round, from 0.
        dataset (`torch.utils.data.Subset`): Its examples.
        received ([`~weights.Payload`]): What the server sent. A method that sends this client less than the
            [`Strategy.shared`] tensors has it weighed again, and its upload.
        out_P (`Tensor` of shape `[P]`): Where its upload goes.
        seed (`int`): Of its data order and dropout.
        kept (`dict[str, Tensor]`, *optional*): What [`Strategy.train_client`] left with it in its last round, and as
            `row_P` what [`Strategy.synchronise`] did; empty if it never took part.
        kept_optimizer (`dict[str, Tensor]`, *optional*): Its optimizer's state, for [`LocalTrainer.train`].
    """

    client: int
    round_index: int
    dataset: Subset
    received: Payload
    out_P: Tensor
    seed: int
    kept: dict[str, Tensor] = field(default_factory=dict)
    kept_optimizer: dict[str, Tensor] | None = None

    @property
    def received_P(self) -> Tensor:
        """The row `[P]` that it starts from, see [`Strategy.download`]."""
        return self.received.row_P

    @property
    def integers(self) -> dict[str, Tensor]:
        """Integer buffers to start from."""
        return self.received.integers


# Which hooks each of a strategy's flags is a promise of.
PROMISES = {
    "compressible": ("download",),
    "keeps_optimizer": ("train_client",),
    "needs": ("update", "synchronise"),
    "shares_batches": ("train_client", "loss"),
}
# What a flag says where nothing is promised.
NO_PROMISE = {"needs": "rows"}


class Strategy(LocalObjective):
    """
    A federated method. This base class is plain federated averaging; a method overrides the hooks in which it differs.

    A strategy keeps no state of its own between rounds: what must survive a resume goes into `server.tensors`.
    """

    name: str = "fedavg"
    # What recipes and comparisons build for it around the experiment's classifier: a name in
    # `hf_fedmoe/experiments/server_models.py`.
    trains: str = "classifier"
    # What follows are promises of the hooks, `PROMISES`.
    # Whether the server knows what each client starts from, which is what an encoded update is measured from.
    compressible: bool = True
    # Whether a client can go on with the optimizer state of its last round.
    keeps_optimizer: bool = True
    # What the server does with the models that were uploaded, after `probe`: "rows" (anything), "fusion" (nothing but
    # `Uploads.fuse_into_`) or "mean" (nothing but `Uploads.average_into_`).
    needs: str = "mean"
    # Whether processes may train a client together: the loss of a batch is the mean of those of its rows, but for
    # terms of the parameters, and clients have the server's model or a part of it.
    shares_batches: bool = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A class that overrides a hook keeps no promise of it that was made for another: it has to say it again."""
        super().__init_subclass__(**kwargs)

        def place(name: str) -> int:
            return next(index for index, owner in enumerate(cls.__mro__) if name in vars(owner))

        for flag, hooks in PROMISES.items():
            if min(map(place, hooks)) < place(flag):
                setattr(cls, flag, NO_PROMISE.get(flag, False))

    def check_arguments(self, args: TrainingArguments) -> None:
        """Raises `ValueError` that names the field, its value and the remedy, where the method cannot do with it."""

    def server_models(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        """The modules that become the rows of the server's bank; clients have the architecture of the first."""
        return [as_expert(model)]

    def setup(self, server: Server, num_clients: int) -> None:
        """Called once before the first round (not after a resume): fills `server.tensors`."""

    def participants(self, server: Server, drawn: list[int], round_index: int) -> list[int]:
        """Chooses who takes part in a round: the clients that were drawn."""
        return drawn

    def download(self, server: Server, client: int, kept_P: Tensor | None) -> Tensor:
        """
        The row `[P]` that `client` starts from. `kept_P` is what [`Strategy.synchronise`] left with the client after
        its last round, `None` if it never took part.
        """
        return server.bank_SP[0]

    def download_tensors(self, server: Server, client: int) -> dict[str, Tensor]:
        """Named tensors that `client` is sent beside its model, where it finds them as `task.received.tensors`."""
        return {}

    def upload_tensors(self, server: Server, client: int) -> dict[str, Tensor]:
        """
        Tensors, whose values do not matter, of the names, shapes and types that an upload of `client` has beside its
        model: [`Strategy.train_client`] puts them into `payload.tensors`, [`Strategy.update`] finds their sum as
        `uploads.sum_of(name)`.
        """
        return {}

    def train_client(self, local: LocalTrainer, task: ClientTask) -> tuple[Payload, dict[str, Tensor]]:
        """
        Trains a participant; gives its upload, and tensors that stay with it until its next round, which are kept only
        if the upload is accepted.
        """
        args = (task.dataset, task.received_P, task.integers, task.out_P, task.seed, task.kept_optimizer)
        return local.train(*args), {}

    def upload_fault(self, server: Server, payload: Payload) -> str | None:
        """
        Says why an upload must be refused that is sound by itself, `None` if it need not: where what it has beside its
        model cannot be.
        """
        return None

    def shared(self, server: Server, round_index: int) -> Collection[str] | None:
        """
        Names of the tensors that travel in this round, each way; `None` for all. The others stay private: in an upload
        they have the values of the server's row 0.
        """
        return None

    def links(self, server: Server, client: int, participants: list[int]) -> int:
        """Tells with how many others a participant exchanges its model: with the server."""
        return 1

    def probe(self, server: Server, row_P: Tensor, reserved: ReservedSet | None) -> Tensor | None:
        """
        Asks a sound upload, by itself, for what [`Strategy.update`] needs of it: nothing. Of several processes the
        one that has trained the client does it, where its row is in memory.
        """
        return None

    def update(self, server: Server, uploads: Uploads, step: ServerStep) -> dict[str, float]:
        """Takes the server's step: changes `server` in place and returns what is worth logging."""
        return uploads.average_into_(server)

    def finish(self, server: Server, step: ServerStep) -> None:
        """Called once after the last round."""

    def synchronise(self, server: Server, uploads: Uploads) -> dict[int, Tensor]:
        """Rows `[P]` that stay with the participants until their next round; by default nothing stays."""
        return {}

    def personal_model(self, server: Server, local: LocalTrainer, task: ClientTask) -> nn.Module:
        """
        The model that is evaluated for a client, in no round: by default the server's. `task.received_P` is row 0 of
        the bank and `task.kept` empty for a client that never took part, as are all that are kept unseen.
        """
        return server.model

    def needs_reserved_set(self) -> bool:
        """Tells whether [`Strategy.probe`], [`Strategy.update`] or [`Strategy.finish`] reads the reserved set."""
        return False


def has_plain_clients(strategy: Strategy) -> bool:
    """Tells whether clients only train, by a loss of which [`has_own_loss`] is true: whoever computes it may."""
    return type(strategy).train_client is Strategy.train_client and has_own_loss(strategy)


def overrides(strategy: Strategy | type[Strategy], hook: str) -> bool:
    """Tells whether a method has a hook of its own."""
    kind = strategy if isinstance(strategy, type) else type(strategy)
    return getattr(kind, hook) is not getattr(Strategy, hook)


def warmed_up(rate: float, round_index: int) -> float:
    """
    The rate of a moving average in round `round_index` (from 0): a plain running mean until its horizon is filled, so
    that the common start, which no client has trained, has no part in it.
    """
    return max(rate, 1 / (round_index + 1))
