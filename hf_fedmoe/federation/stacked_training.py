"""
Training several clients at once: their models are one of stacked weights, which `torch.vmap` runs as if it were each.
Many small operations become few large ones, which pays where one client does not fill the device.

Shape suffixes: n clients that are trained at once, P elements of a model's row, b rows of each client's batch.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Subset
from transformers import masking_utils

from ..models import AdapterExpert
from ..weights import Payload, StateLayout
from .contract import ClientTask
from .local_training import LocalTrainer, local_steps


# The label of rows that fill a batch up: the losses of PyTorch and of Hugging Face leave it out of their mean.
NO_LABEL = -100


@dataclass
class StackedTraining:
    """
    Trains several clients at once, by the model's own loss and [`LocalObjective.proximal_weight`], with an optimizer
    that treats each weight by itself.

    Each client sees its examples in the order in which it would alone. What is random besides, dropout and
    augmentation, is drawn for all of them together.

    Args:
        local ([`LocalTrainer`]): Of one client.
        at_once (`int`): The most clients that are trained at once.
        constant_rate (`bool`): Whether the learning rate is the same in all steps of all clients.
    """

    local: LocalTrainer
    at_once: int
    constant_rate: bool

    @cached_property
    def _twin(self) -> LocalTrainer:
        """Makes the trainer whose worker becomes the models of several clients."""
        (twin,) = self.local.twins(1)
        return twin

    @cached_property
    def _stack(self) -> "Stack":
        return Stack(self._twin.worker, self.local.layout)

    def groups(self, sizes: Sequence[int]) -> list[list[int]]:
        """
        Those with equally many steps, each of equally many batches, and of equally many rows if there is BatchNorm.
        Where nothing depends on that, any: those with the most steps first.
        """
        local = self.local
        plans = [local_steps(size, local.args, seed=0, never_one=local.has_batch_statistics) for size in sizes]
        alike: dict[tuple[int, ...], list[int]] = {}
        for place in sorted(range(len(sizes)), key=lambda place: -len(plans[place])):
            batches = [len(step) for step in plans[place]]
            if local.layout.batchnorm:
                kind = (*batches, *(len(batch) for step in plans[place] for batch in step))
            elif self.constant_rate and local.args.gradient_accumulation_steps == 1:
                kind = ()
            else:
                kind = tuple(batches)
            alike.setdefault(kind, []).append(place)
        return [
            places[start : start + self.at_once]
            for places in alike.values()
            for start in range(0, len(places), self.at_once)
        ]

    def reading(self, clients: Sequence[tuple[Subset, int]]) -> tuple[Subset, list[list[int]], int]:
        """Batches of equally many rows of each client that is still training; one that has fewer repeats its first."""
        if len(clients) == 1:
            return self.local.reading(clients)
        indices: list[int] = []
        batches_n = []
        for dataset, seed in clients:
            plan = self.local.plan(dataset, seed)
            batches_n.append([[len(indices) + place for place in batch] for step in plan for batch in step])
            indices += dataset.indices
        places = []
        for number in range(len(batches_n[0])):
            batches = [own[number] for own in batches_n if number < len(own)]
            b = max(map(len, batches))
            places.append([place for batch in batches for place in batch + batch[:1] * (b - len(batch))])
        (dataset, seed), *_ = clients
        return Subset(dataset.dataset, indices), places, seed

    def train(self, tasks: Sequence[ClientTask]) -> list[Payload]:
        """Returns the uploads of one of the [`StackedTraining.groups`], their rows written where the tasks say."""
        local, twin, stack, n = self.local, self._twin, self._stack, len(tasks)
        plans = [local.plan(task.dataset, task.seed) for task in tasks]
        stack.load([task.received_P for task in tasks], [task.integers for task in tasks])
        stack.module.train()
        twin.reset_optimizer()
        scheduler = local.make_scheduler(twin.optimizer, len(plans[0]))
        received = {
            name: weight_n.detach().clone()
            for name, weight_n in stack.weights.items()
            if local.strategy.proximal_weight
        }
        batches = local.read(*self.reading([(task.dataset, task.seed) for task in tasks]))
        total_n = torch.zeros(n, device=local.accelerator.device)
        integers: dict[int, dict[str, Tensor]] = {}
        for number in range(len(plans[0])):
            steps = [plan[number] for plan in plans[:n]]
            for rows in zip(*steps, strict=True):
                batch = by_client(next(batches), [len(own) for own in rows])
                total_n[:n] += self._backward_n(batch, len(steps[0]))
            total_n[:n] += pull_(stack.weights, received, local.strategy.proximal_weight)
            if local.args.max_grad_norm:
                clip_each_(stack.weights.values(), local.args.max_grad_norm)
            twin.optimizer.step()
            scheduler.step()
            twin.optimizer.zero_grad()
            left = sum(len(plan) > number + 1 for plan in plans)
            integers |= {index: stack.read(index, tasks[index].out_P) for index in range(left, n)}
            if 0 < left < n:
                stack.keep(left, twin.optimizer)
                received = {name: start_n[:left] for name, start_n in received.items()}
                n = left
        return [
            Payload(task.out_P, integers[index], len(task.dataset), {"loss": loss / len(plan), "steps": len(plan)})
            for index, (task, plan, loss) in enumerate(zip(tasks, plans, total_n.tolist(), strict=True))
        ]

    def _backward_n(self, batch: dict[str, Tensor], count: int) -> Tensor:
        """Adds the gradients of one of `count` batches of a step; returns what it adds to the losses."""
        with self.local.accelerator.autocast():
            losses_n = self._stack.losses(batch) / count
        self._stack.backward(losses_n.sum())
        # Nothing of the graph outlives this: it would remember how many models there were.
        return losses_n.detach()

    def try_out(self, dataset: Subset) -> None:
        """Raises `ValueError` unless the first and the last example have their losses together as by themselves."""
        begin, local = f"`clients_at_once` is {self.at_once}, but", self.local
        if local.accelerator.scaler is not None:
            raise ValueError(f"{begin} fp16 scales the gradients of one model: take `bf16`, or set it to 1.")
        ends, device = (0, len(dataset) - 1), local.accelerator.device
        row_P, integers = local.layout.read(local.worker), local.layout.read_integers(local.worker)
        self._stack.load([row_P] * 2, [integers] * 2)
        self._stack.module.eval()
        local.worker.eval()
        # Each twice, of which one fills up.
        batch = local.collate([dataset[place] for place in ends for _ in range(2)])
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        with torch.no_grad():
            alone = [local.worker(**{name: t[place] for name, t in batch.items()}).loss.item() for place in ([0], [2])]
        try:
            losses_n = self._stack.losses(by_client(batch, [1, 1]))
            self._stack.backward(losses_n.sum())
        except (RuntimeError, ValueError) as error:
            problem = f"cannot go through `torch.vmap`: {error}"
        else:
            if np.allclose(losses_n.tolist(), alone, rtol=1e-2):
                return self._twin.optimizer.zero_grad()
            problem = f"has the losses {losses_n.tolist()} together and {alone} alone"
        raise ValueError(f"{begin} the {type(local.worker).__name__} {problem}. Set it to 1.")


class Stack:
    """
    Several models as one: a module whose parameters, and the buffers of its state, have a dimension for them in front.

    Args:
        module (`nn.Module`): Changed in place.
        layout ([`StateLayout`]): Of one of the models.
    """

    def __init__(self, module: nn.Module, layout: StateLayout):
        self.layout = layout
        # What runs: of an adapter the base that it is in, where its tensors have other names.
        self.module = module.base if isinstance(module, AdapterExpert) else module
        state = module.state_dict(keep_vars=True)
        self._state = {name: state[name] for name in (*(slot.name for slot in layout.slots), *layout.integers)}
        self.weights = {name: t for name, t in self._state.items() if isinstance(t, nn.Parameter)}
        inner = [*self.module.named_parameters(), *self.module.named_buffers()]
        own = {id(tensor) for tensor in self._state.values()}
        self._by_inner_name = {name: tensor for name, tensor in inner if id(tensor) in own}
        self._paddings = [
            (embedding.weight, embedding.padding_idx)
            for embedding in self.module.modules()
            if isinstance(embedding, nn.Embedding) and embedding.padding_idx is not None
        ]

    @torch.no_grad()
    def load(self, rows: Sequence[Tensor], integers: Sequence[dict[str, Tensor]]) -> None:
        """The module becomes the models of rows `[P]` and their integer buffers."""
        states = [self.layout.views(row_P) | own for row_P, own in zip(rows, integers, strict=True)]
        for name, tensor_n in self._state.items():
            shape = (len(rows), *states[0][name].shape)
            if tensor_n.shape != shape:
                tensor_n.data = tensor_n.new_empty(shape)
            torch.stack([state[name] for state in states], out=tensor_n.data)

    def losses(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss `[n]` of each model on its part of a batch of tensors `[n, b, ...]`."""

        def loss(state: dict[str, Tensor], own: dict[str, Tensor]) -> Tensor:
            return functional_call(self.module, state, kwargs=own).loss

        # Of the kinds of attention only this one consists of what `vmap` has rules for, on every device. Its gradient
        # does too: the backward needs to be told nothing.
        with masks_without_shortcuts(), sdpa_kernel(SDPBackend.MATH):
            return vmap(loss, randomness="different")(self._by_inner_name, batch)

    def backward(self, loss: Tensor) -> None:
        """Adds to the gradients."""
        loss.backward()
        # `vmap` forgets that nothing is learned from padding.
        for weight_n, padding in self._paddings:
            if weight_n.grad is not None:
                weight_n.grad[:, padding] = 0

    @torch.no_grad()
    def read(self, index: int, out_P: Tensor) -> dict[str, Tensor]:
        """Writes one of the models to a row; returns its integer buffers."""
        for name, view in self.layout.views(out_P).items():
            view.copy_(self._state[name][index])
        return {name: self._state[name][index].clone() for name in self.layout.integers}

    def keep(self, count: int, optimizer: torch.optim.Optimizer) -> None:
        """Only the first models stay, with their part of an optimizer's state."""
        for tensor_n in self._state.values():
            tensor_n.data = tensor_n.data[:count]
        for entries in optimizer.state.values():
            for key, value in entries.items():
                if isinstance(value, Tensor) and value.dim():  # not the number of steps
                    entries[key] = value[:count]


def by_client(batch: dict[str, Tensor], sizes: Sequence[int]) -> dict[str, Tensor]:
    """Tensors `[n * b, ...]` as `[n, b, ...]`, without the labels of rows beyond each client's own."""
    batch = {name: tensor.unflatten(0, (len(sizes), -1)) for name, tensor in batch.items()}
    labels_nb = batch["labels"]
    if min(sizes) < labels_nb.shape[1]:
        filling = torch.arange(labels_nb.shape[1]) >= torch.tensor(sizes)[:, None]
        labels_nb.masked_fill_(filling.to(labels_nb.device), NO_LABEL)
    return batch


@torch.no_grad()
def pull_(weights: dict[str, nn.Parameter], received: dict[str, Tensor], mu: float) -> Tensor | float:
    """Adds the gradient of mu / 2 ||w - w_received||^2 of each client; returns its values `[n]`."""
    total_n: Tensor | float = 0.0
    for name, start_n in received.items():
        moved_n = weights[name] - start_n
        grad = weights[name].grad
        weights[name].grad = mu * moved_n if grad is None else grad.add_(moved_n, alpha=mu)
        total_n = total_n + mu / 2 * moved_n.reshape(len(moved_n), -1).square().sum(1)
    return total_n


@torch.no_grad()
def clip_each_(weights: Iterable[nn.Parameter], max_norm: float) -> None:
    """[`~torch.nn.utils.clip_grad_norm_`] of each client by itself."""
    grads = [weight_n.grad for weight_n in weights if weight_n.grad is not None]
    norms_n = torch.stack([grad.reshape(len(grad), -1).norm(dim=1) for grad in grads]).norm(dim=0)
    scale_n = (max_norm / (norms_n + 1e-6)).clamp(max=1)
    for grad in grads:
        grad.mul_(scale_n.view(-1, *[1] * (grad.dim() - 1)))


@contextmanager
def masks_without_shortcuts() -> Iterator[None]:
    """
    Transformers asks attention masks whether they can be left out, which no mask can answer for all clients of a
    `vmap`, unless a graph is traced. Here it is told so.
    """
    is_tracing = masking_utils.is_tracing
    try:
        masking_utils.is_tracing = lambda *_: True
        yield
    finally:
        masking_utils.is_tracing = is_tracing
