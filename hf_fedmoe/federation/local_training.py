"""Training one client where its data is."""

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from transformers import TrainingArguments

from ..data import has_batch_statistics, split_rows
from ..models import AdapterExpert, guard_narrow_convolutions
from ..weights import Payload, StateLayout, copy_module
from .batch_reader import BatchReader
from .batch_worker import Wanted
from .captured_passes import CapturedPasses
from .client_clock import ClientClock
from .example_privacy import ExamplePrivacy, PrivateUpdates, poisson_draw
from .local_updates import CapturedUpdates, LocalUpdates
from .objective import LocalObjective, has_own_loss, held_near, own_loss
from .process_group import ProcessGroup, Stage
from .randomness import Stream, seed_of


Loss = Callable[[nn.Module, dict[str, Tensor]], Tensor]
# A dataset, the indices of each batch, the seed of augmentation.
Reading = tuple[Subset, list[list[int]], int]


def local_steps(
    num_examples: int, args: TrainingArguments, seed: int, epochs: float | None = None, never_one: bool = False
) -> list[list[list[int]]]:
    """
    A client's local training as optimizer steps: each a list of accumulated batches, each a list of indices.

    Every epoch has a new random order that follows from `seed`; accumulation does not reach across epochs and a
    fractional last epoch is rounded up to whole steps, as in `Trainer`. `epochs` replaces `args.num_train_epochs`.
    With `never_one` a last row by itself joins the batch before it, see [`~data.split_rows`].
    """
    epochs = args.num_train_epochs if epochs is None else epochs
    generator = torch.Generator().manual_seed(seed)
    steps: list[list[list[int]]] = []
    for _ in range(math.ceil(epochs)):
        order = torch.randperm(num_examples, generator=generator)
        if args.dataloader_drop_last and num_examples > args.train_batch_size:
            order = order[: num_examples // args.train_batch_size * args.train_batch_size]
        batches = [batch.tolist() for batch in split_rows(order, args.train_batch_size, never_one)]
        accumulation = args.gradient_accumulation_steps
        steps += [batches[start : start + accumulation] for start in range(0, len(batches), accumulation)]
    steps_per_epoch = len(steps) // math.ceil(epochs)
    return steps[: math.ceil(epochs * steps_per_epoch)]


def scale_learning_rates(optimizer: torch.optim.Optimizer, model: nn.Module, factors: dict[str, float]) -> None:
    """Multiplies the rates of the named parameters, which move to parameter groups of their own."""
    factor_of = {parameter: factors.get(name, 1.0) for name, parameter in model.named_parameters()}
    for group in list(optimizer.param_groups):
        parameters = group["params"]
        group["params"] = [parameter for parameter in parameters if factor_of[parameter] == 1.0]
        for factor in sorted({factor_of[parameter] for parameter in parameters} - {1.0}):
            scaled = [parameter for parameter in parameters if factor_of[parameter] == factor]
            optimizer.add_param_group(group | {"params": scaled, "lr": group["lr"] * factor})


@dataclass
class StepBatches:
    """
    The batches of one optimizer step on the device, fetched as they are asked for.

    Args:
        source (`Iterable[dict[str, Tensor]]`): Gives the batches, or this process's shares of them.
        weights (`list[float]`): How much the mean loss of each counts: 1, or the share of its rows.
    """

    source: Iterable[dict[str, Tensor]]
    weights: list[float]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return itertools.islice(self.source, len(self.weights))

    def kept(self) -> "StepBatches":
        """Fetches the batches now, for more than one pass."""
        return StepBatches(list(self), self.weights)


@dataclass
class LocalTrainer:
    """
    Trains clients one after another in one worker module with one optimizer, reset for each.

    `Trainer.train()` per client would cost a full garbage collection each time, more than many a client's training.

    [`LocalTrainer.train`] is what most methods need. One that does something else with each batch puts its loop
    together from [`LocalTrainer.plan`], [`LocalTrainer.begin`], [`LocalTrainer.steps`] and [`LocalTrainer.step`], of
    which `train` consists. One that trains several models at once asks for [`LocalTrainer.twins`], one whose clients
    have other architectures for [`LocalTrainer.of`].

    Args:
        worker (`nn.Module`): The client model, on the device.
        layout ([`StateLayout`]): Of `worker`.
        strategy ([`LocalObjective`]): The method, which gives the loss.
        args ([`~transformers.TrainingArguments`]): Local epochs, batch size, accumulation, clipping.
        collate (`Callable`): The data collator.
        optimizer (`torch.optim.Optimizer`): Over the worker's parameters, prepared by Accelerate.
        make_scheduler (`Callable`): From (optimizer, number of local steps) to a learning-rate scheduler.
        accelerator ([`~accelerate.Accelerator`]): Precision, gradient scaling, device.
        make_optimizer (`Callable`): From a module to another such optimizer, for twins.
        process_group ([`ProcessGroup`], *optional*): Trains a client together; this process alone if left out.
        reader ([`BatchReader`], *optional*): Worker processes that read clients' batches; this one does if left out.
        clock ([`ClientClock`], *optional*): How long a client may take; as long as it likes if left out.
        objective (`Callable`, *optional*): Of (model, batch), in the place of the model's own loss.
        cuda_graphs (`bool`, *optional*, defaults to `False`): Whether forward and backward passes of shapes that come
            again are replayed as CUDA graphs, on a GPU.
        example_privacy ([`ExamplePrivacy`], *optional*): Has [`LocalTrainer.train`] hide single examples by DP-SGD.
    """

    worker: nn.Module
    layout: StateLayout
    strategy: LocalObjective
    args: TrainingArguments
    collate: Callable
    optimizer: torch.optim.Optimizer
    make_scheduler: Callable
    accelerator: Accelerator
    make_optimizer: Callable
    process_group: ProcessGroup = field(default_factory=ProcessGroup)
    reader: BatchReader | None = None
    clock: ClientClock = field(default_factory=ClientClock)
    objective: Loss = own_loss
    cuda_graphs: bool = False
    example_privacy: ExamplePrivacy | None = None

    def __post_init__(self) -> None:
        self._parameters = list(self.worker.parameters())
        runs = self.worker.base if isinstance(self.worker, AdapterExpert) else self.worker
        self.has_batch_statistics = has_batch_statistics(runs)
        self._trainable = {name: p.requires_grad for name, p in self.worker.named_parameters()}
        self._only: Collection[str] | None = None
        # Whether the client that began last goes on with the optimizer of its last round.
        self.has_kept_optimizer = False
        self._twins: list[LocalTrainer] = []
        self._others: dict[str, LocalTrainer] = {}
        # Accelerate's wrapper looks for an optional package on disk in every step; without scaling it does nothing
        # else, but on TPUs.
        if self.accelerator.scaler is None and self.accelerator.distributed_type != DistributedType.XLA:
            assert isinstance(self.optimizer, AcceleratedOptimizer)  # it is prepared
            self.optimizer = self.optimizer.optimizer
        self._pass, self._updates = self._plain_pass, LocalUpdates(self.optimizer, self._clip)
        if self.captures:
            grads: dict[nn.Parameter, Tensor] = {}
            self._pass = CapturedPasses(self.worker, self._plain_pass, self.clock.whole, grads)
            self._updates = CapturedUpdates(self.optimizer, self._clip, grads)
        self.private_updates: PrivateUpdates | None = None
        if self.example_privacy is not None:
            self.private_updates = PrivateUpdates(self.optimizer, self._clip, self.worker, runs, self.example_privacy)
            self._updates = self.private_updates
        if self.args.torch_compile:
            # In place: strategies see the module itself.
            self.worker.compile(backend=self.args.torch_compile_backend, mode=self.args.torch_compile_mode)

    @property
    def captures(self) -> bool:
        """Tells whether passes may become CUDA graphs."""
        compiled, scaler = self.args.torch_compile, self.accelerator.scaler
        replayable = not compiled and scaler is None and self.example_privacy is None
        return self.cuda_graphs and self.accelerator.device.type == "cuda" and replayable

    def train(
        self,
        dataset: Subset,
        received_P: Tensor,
        integers: dict[str, Tensor],
        out_P: Tensor,
        seed: int,
        kept_optimizer: dict[str, Tensor] | None = None,
        *,
        epochs: float | None = None,
        only: Collection[str] | None = None,
        loss: Loss | None = None,
    ) -> Payload:
        """
        One client's local epochs from the received row; its trained row is written to `out_P`.

        Args:
            dataset (`torch.utils.data.Subset`): The client's examples.
            received_P (`Tensor` of shape `[P]`): What it starts from.
            integers (`dict[str, Tensor]`): Integer buffers to start from.
            out_P (`Tensor` of shape `[P]`): Where the upload goes.
            seed (`int`): Of the data order and of dropout.
            kept_optimizer (`dict[str, Tensor]`, *optional*): Optimizer state of its last round
                ([`LocalTrainer.optimizer_tensors`]); fresh without.
            epochs (`float`, *optional*): Local epochs, `args.num_train_epochs` if left out.
            only (`Collection[str]`, *optional*): Names of the parameters that learn; all if left out.
            loss (`Callable`, *optional*): Of (model, batch); that of the strategy if left out.
        """
        if loss is None:
            loss = self.loss_near(received_P)
        plan = self.plan(dataset, seed, epochs)
        self.begin(received_P, integers, len(plan), kept_optimizer, only)
        if self.private_updates is not None:
            expected = poisson_draw(len(dataset), self.args, epochs).expected
            mu = self.strategy.proximal_weight
            self.private_updates.begin_client(expected, seed, self.layout.views(received_P), mu)
        total = torch.zeros((), device=self.accelerator.device)
        for batches in self.steps(dataset, plan, seed):
            total += self.step(batches, loss)
        return self.payload(out_P, len(dataset), total, len(plan))

    def loss_near(self, received_P: Tensor) -> Loss:
        """The loss of (model, batch) of a client that received a row: [`LocalObjective.loss`] of `objective`."""
        # In private steps what holds the model near is added to the gradients of examples.
        if has_own_loss(self.strategy) and (not self.strategy.proximal_weight or self.example_privacy is not None):
            return self.objective
        received = self.layout.views(received_P)

        def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            if has_own_loss(self.strategy):
                return self.objective(model, batch) + held_near(model, received, self.strategy.proximal_weight)
            return self.strategy.loss(model, batch, received)

        return loss

    def plan(self, dataset: Subset, seed: int, epochs: float | None = None) -> list[list[list[int]]]:
        """The client's optimizer steps, see [`local_steps`]; in private runs see [`ExamplePrivacy.steps`]."""
        if self.example_privacy is not None:
            draw = poisson_draw(len(dataset), self.args, epochs)
            return self.example_privacy.steps(draw, len(dataset), seed)
        return local_steps(len(dataset), self.args, seed, epochs, self.has_batch_statistics)

    def begin(
        self,
        row_P: Tensor,
        integers: dict[str, Tensor],
        num_steps: int,
        kept_optimizer: dict[str, Tensor] | None = None,
        only: Collection[str] | None = None,
    ) -> None:
        """The worker becomes the model of `row_P`, about to take `num_steps` steps with a fresh optimizer."""
        with self.clock.whole():
            self.load(row_P, integers)
            self._learn(only)
            self.reset_optimizer(kept_optimizer)
            self._scheduler = self.make_scheduler(self.optimizer, num_steps)
            self.worker.train()

    def read_ahead(self, readings: Iterable[Reading]) -> None:
        """Has worker processes, if there are any, begin to read what training will ask for, one after another."""
        if self.reader is not None:
            self.reader.expect(self._wanted(*reading) for reading in readings)

    def reading(self, clients: Sequence[tuple[Subset, int]]) -> Reading:
        """Gives what is read to train a client, which is a dataset and a seed."""
        ((dataset, seed),) = clients
        return dataset, list(self.own_rows(self.plan(dataset, seed))), seed

    def read(self, dataset: Subset, places: list[list[int]], seed: int) -> Iterator[dict[str, Tensor]]:
        """Gives the batches of these indices, and seeds whatever is random about them and about dropout."""
        self._seed(seed)
        return self._batches(dataset, places, seed)

    def own_rows(self, plan: list[list[list[int]]]) -> Iterator[list[int]]:
        """The indices of each batch of [`LocalTrainer.steps`]: as planned, or of this process's share."""
        return (self.process_group.share(batch)[0] for step in plan for batch in step)

    def own_places(self, plan: list[list[list[int]]]) -> Iterator[Tensor]:
        """Gives [`LocalTrainer.own_rows`] as indices on the device: in one copy, as a GPU is waited for by each."""
        batches = list(self.own_rows(plan))
        places_N = torch.tensor(list(itertools.chain(*batches)), dtype=torch.int64)
        return iter(places_N.to(self.accelerator.device).split([len(batch) for batch in batches]))

    def steps(self, dataset: Subset, plan: list[list[list[int]]], seed: int) -> Iterator[StepBatches]:
        """The batches of each planned step; `seed` is that of dropout and augmentation, see [`ExamplePrivacy`]."""
        if self.example_privacy is not None:
            seed = self.example_privacy.seed_of_masks(seed)
        self._seed(self.process_group.seed(seed))
        batches = self._batches(dataset, list(self.own_rows(plan)), seed)
        for step in plan:
            yield StepBatches(batches, [self.process_group.share(batch)[1] for batch in step])

    def step(self, batches: StepBatches, loss: Loss) -> Tensor:
        """One optimizer step on the accumulated batches; returns their mean loss."""
        total = self.backward(batches, loss)
        self.apply_gradients()
        return total

    def backward(self, batches: StepBatches, loss: Loss) -> Tensor:
        """The gradients of a step, left in the worker's parameters; returns the mean loss."""
        total = torch.zeros((), device=self.accelerator.device)
        for batch, weight in zip(batches, batches.weights, strict=True):
            total += self._pass(loss, batch, weight, len(batches.weights))
        self.process_group.agree(Stage.STEP)
        return self.process_group.all_reduce_gradients_(self._parameters, total)

    def _plain_pass(self, loss: Loss, batch: dict[str, Tensor], weight: float, count: int) -> Tensor:
        """Adds the gradients of `loss * weight / count` of a batch and returns that."""
        with self.accelerator.autocast():
            value = loss(self.worker, batch)
        self.accelerator.backward(value * weight / count)
        return value.detach() * weight / count

    def apply_gradients(self) -> None:
        """Clips the gradients, if asked, and lets the optimizer take its step."""
        with self.clock.whole():
            self._updates()
            self._scheduler.step()

    def _clip(self) -> None:
        if self.args.max_grad_norm:
            self.accelerator.clip_grad_norm_(self._parameters, self.args.max_grad_norm)

    def payload(self, out_P: Tensor, num_examples: int, total_loss: Tensor, num_steps: int) -> Payload:
        """The worker as an upload, its row written to `out_P`."""
        self.layout.read(self.worker, out=out_P)
        metrics: dict[str, float] = {"steps": num_steps}
        if self.example_privacy is None:  # no noise hides what the loss tells of single examples
            metrics["loss"] = (total_loss / num_steps).item()
        payload = Payload(out_P, self.layout.read_integers(self.worker), num_examples, metrics)
        payload.weigh(self.layout)
        return payload

    def load(self, row_P: Tensor, integers: dict[str, Tensor]) -> nn.Module:
        """The worker as the model of `row_P`."""
        with self.clock.whole():
            self._learn(None)
            self.layout.write(row_P, self.worker)
            self.layout.write_integers(integers, self.worker)
        return self.worker

    @torch.no_grad()
    def mean_loss(self, dataset: Subset, row_P: Tensor, integers: dict[str, Tensor], seed: int) -> float:
        """The mean of `objective` over a client's examples, without dropout."""
        model = self.load(row_P, integers).eval()
        total = torch.zeros((), device=self.accelerator.device)
        for batch in self.in_order(dataset, seed):
            with self.accelerator.autocast():
                total += self.objective(model, batch) * len(next(iter(batch.values())))
        return (total / len(dataset)).item()

    def least_loss(self, dataset: Subset, rows_KP: Tensor, integers: dict[str, Tensor], seed: int) -> int:
        """Tells which of some models has the least [`mean_loss`] over a client's examples; a NaN is not the least."""
        losses = [self.mean_loss(dataset, row_P, integers, seed) for row_P in rows_KP]
        return min(range(len(losses)), key=lambda k: (math.isnan(losses[k]), losses[k]))

    def in_order(self, dataset: Subset, seed: int) -> Iterator[dict[str, Tensor]]:
        """Batches of a client's examples in their order; `seed` is that of augmentation."""
        self._seed(seed)
        places = torch.arange(len(dataset)).split(self.args.eval_batch_size)
        yield from self._batches(dataset, [indices.tolist() for indices in places], seed)

    def twins(self, count: int) -> list["LocalTrainer"]:
        """Further trainers, each with a worker and an optimizer of its own: for clients that train several models."""
        self._learn(None)
        while len(self._twins) < count:
            worker = copy_module(self.worker)
            self._twins.append(dataclasses.replace(self, worker=worker, optimizer=self.make_optimizer(worker)))
        return self._twins[:count]

    def of(self, name: str, make: Callable[[], nn.Module]) -> "LocalTrainer":
        """
        The trainer of a module of another architecture, with an optimizer of its own: for methods whose clients differ
        in their models. `make` is called when `name` is asked for the first time.
        """
        if name not in self._others:
            worker = guard_narrow_convolutions(make()).to(self.accelerator.device)
            self._others[name] = dataclasses.replace(
                self, worker=worker, layout=StateLayout.of(worker), optimizer=self.make_optimizer(worker)
            )
        return self._others[name]

    def close(self) -> None:
        """Ends worker processes, if there are any."""
        if self.reader is not None:
            self.reader.close()

    def learn_by(self, objective: Loss) -> None:
        """Sets `objective`, also of the trainers that were made of this one."""
        self.objective = objective
        for trainer in (*self._twins, *self._others.values()):
            trainer.learn_by(objective)

    def _learn(self, only: Collection[str] | None) -> None:
        """Only the parameters of these names learn; all that may if `None`."""
        if only is None and self._only is None:
            return
        for name, parameter in self.worker.named_parameters():
            parameter.requires_grad_(self._trainable[name] and (only is None or name in only))
        self._only = only

    def _seed(self, seed: int) -> None:
        """Seeds dropout and augmentation, whatever library a collator draws from."""
        random.seed(seed)
        np.random.seed(seed % 2**32)
        # `torch.manual_seed` formats a stack trace for every accelerator that is not there: half a millisecond.
        device = self.accelerator.device
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(seed)
        elif device.type != "cpu":
            torch.manual_seed(seed)

    def _batches(self, dataset: Subset, places: list[list[int]], seed: int) -> Iterator[dict[str, Tensor]]:
        device = self.accelerator.device
        pin_memory = self.args.dataloader_pin_memory and device.type == "cuda"
        if self.reader is not None and isinstance(dataset, Subset) and dataset.dataset is self.reader.pool:
            batches: Iterable[dict[str, Tensor]] = self.reader.read(
                self._wanted(dataset, places, seed), self.clock.check
            )
        else:
            batches = DataLoader(dataset, batch_sampler=places, collate_fn=self.collate)
        for batch in batches:
            self.clock.check()
            if pin_memory:
                batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
            yield {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}

    def _wanted(self, dataset: Subset, places: list[list[int]], seed: int) -> list[Wanted]:
        """Batches of a client as worker processes are asked for them."""
        return [
            (seed_of(self.process_group.seed(seed), Stream.BATCH, index), [dataset.indices[place] for place in batch])
            for index, batch in enumerate(places)
        ]

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimizer's state after [`LocalTrainer.train`] as named tensors, for the client store."""
        return self._updates.tensors()

    def reset_optimizer(self, kept: dict[str, Tensor] | None = None) -> None:
        """Makes the optimizer a fresh one, or that of a client's last round."""
        self.has_kept_optimizer = kept is not None
        self._updates.reset(kept)
        # A client may have failed between two batches of a step.
        self.optimizer.zero_grad()
