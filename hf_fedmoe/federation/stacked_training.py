"""
Training several clients at once: their models are one of stacked weights, which `torch.vmap` runs as if it were each.
Many small operations become few large ones, which pays where one client does not fill the device.

Shape suffixes: n clients that are trained at once, P elements of a model's row, b rows of each client's batch.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils.data import Dataset, Subset
from transformers import masking_utils

from ..models import AdapterExpert
from ..strategies import ClientTask
from ..weights import Payload, StateLayout
from .local_training import LocalTrainer, local_steps


# The label of rows that fill a batch up: the losses of PyTorch and of Hugging Face leave it out of their mean.
NO_LABEL = -100


@dataclass
class StackedTrainer(LocalTrainer):
    """
    A [`LocalTrainer`] that can also train several clients at once, by the model's own loss and
    [`~strategies.Strategy.pull`], with an optimizer that treats each weight by itself.

    Each client sees its examples in the order in which it would alone. What is random besides, dropout and
    augmentation, is drawn for all of them together.

    Args:
        at_once (`int`): The most clients that are trained at once.
    """

    at_once: int = field(kw_only=True)

    @cached_property
    def _twin(self) -> LocalTrainer:
        """Whose worker becomes the models of several clients."""
        (twin,) = self.twins(1)
        return twin

    @cached_property
    def _stack(self) -> "Stack":
        return Stack(self._twin.worker, self.layout)

    def groups(self, sizes: Sequence[int]) -> list[list[int]]:
        """Those with equally many steps, each of equally many batches; with BatchNorm, of equal size too."""
        alike: dict[tuple[int, ...], list[int]] = {}
        for place, size in enumerate(sizes):
            plan = local_steps(size, self.args, seed=0)
            batches = [len(step) for step in plan]
            rows = [len(batch) for step in plan for batch in step] if self.layout.batchnorm else []
            alike.setdefault((*batches, *rows), []).append(place)
        return [
            places[start : start + self.at_once]
            for places in alike.values()
            for start in range(0, len(places), self.at_once)
        ]

    def reading(self, clients: Sequence[tuple[Dataset, int]]) -> tuple[Dataset, list[list[int]], int]:
        """Batches of equally many rows of each client; one that has fewer repeats its first."""
        if len(clients) == 1:
            return super().reading(clients)
        indices: list[int] = []
        batches_n = []
        for dataset, seed in clients:
            plan = self.plan(dataset, seed)
            batches_n.append([[len(indices) + place for place in batch] for step in plan for batch in step])
            indices += dataset.indices
        places = []
        for batches in zip(*batches_n, strict=True):
            b = max(map(len, batches))
            places.append([place for batch in batches for place in batch + batch[:1] * (b - len(batch))])
        (dataset, seed), *_ = clients
        return Subset(dataset.dataset, indices), places, seed

    def train_at_once(self, tasks: Sequence[ClientTask]) -> list[Payload]:
        """The uploads of one of the [`StackedTrainer.groups`], their rows written where the tasks say."""
        twin, stack = self._twin, self._stack
        plans = [self.plan(task.dataset, task.seed) for task in tasks]
        num_steps = len(plans[0])
        stack.load([task.received_P for task in tasks], [task.integers for task in tasks])
        stack.module.train()
        twin._reset_optimizer(None)
        twin.optimizer.zero_grad()  # a client may have failed between two batches of a step
        scheduler = self.make_scheduler(twin.optimizer, num_steps)
        received = {name: weight_n.detach().clone() for name, weight_n in stack.weights.items() if self.strategy.pull}
        dataset, places, seed = self.reading([(task.dataset, task.seed) for task in tasks])
        self._seed(seed)
        batches = self._batches(dataset, places, seed)
        total_n = torch.zeros(len(tasks), device=self.accelerator.device)
        for steps in zip(*plans, strict=True):
            for rows in zip(*steps, strict=True):
                batch = by_client(next(batches), [len(own) for own in rows])
                with self.accelerator.autocast():
                    losses_n = stack.losses(batch)
                stack.backward(losses_n.sum() / len(steps[0]))
                total_n += losses_n.detach() / len(steps[0])
            total_n += pull_(stack.weights, received, self.strategy.pull)
            if self.args.max_grad_norm:
                clip_each_(stack.weights.values(), self.args.max_grad_norm)
            twin.optimizer.step()
            scheduler.step()
            twin.optimizer.zero_grad()
        losses = (total_n / num_steps).tolist()
        return [
            stack.payload(index, task, {"loss": loss, "steps": num_steps})
            for index, (task, loss) in enumerate(zip(tasks, losses, strict=True))
        ]

    def try_out(self, dataset: Dataset) -> None:
        """Raises `ValueError` unless the first and the last example have their losses together as by themselves."""
        begin = f"`clients_at_once` is {self.at_once}, but"
        if self.accelerator.scaler is not None:
            raise ValueError(f"{begin} fp16 scales the gradients of one model: take `bf16`, or set it to 1.")
        ends, device = (0, len(dataset) - 1), self.accelerator.device
        row_P, integers = self.layout.read(self.worker), self.layout.read_integers(self.worker)
        self._stack.load([row_P] * 2, [integers] * 2)
        self._stack.module.eval()
        self.worker.eval()
        # Each twice, of which one fills up.
        batch = self.collate([dataset[place] for place in ends for _ in range(2)])
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        with torch.no_grad():
            alone = [self.worker(**{name: t[place] for name, t in batch.items()}).loss.item() for place in ([0], [2])]
        try:
            losses_n = self._stack.losses(by_client(batch, [1, 1]))
            self._stack.backward(losses_n.sum())
        except (RuntimeError, ValueError) as error:
            problem = f"cannot go through `torch.vmap`: {error}"
        else:
            if np.allclose(losses_n.tolist(), alone, rtol=1e-2):
                return self._twin.optimizer.zero_grad()
            problem = f"has the losses {losses_n.tolist()} together and {alone} alone"
        raise ValueError(f"{begin} the {type(self.worker).__name__} {problem}. Set it to 1.")


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

        with masks_without_shortcuts():
            return vmap(loss, randomness="different")(self._by_inner_name, batch)

    def backward(self, loss: Tensor) -> None:
        """Adds to the gradients."""
        loss.backward()
        # `vmap` forgets that nothing is learned from padding.
        for weight_n, padding in self._paddings:
            if weight_n.grad is not None:
                weight_n.grad[:, padding] = 0

    @torch.no_grad()
    def payload(self, index: int, task: ClientTask, metrics: dict[str, float]) -> Payload:
        """One of the models as the upload of its client."""
        for name, view in self.layout.views(task.out_P).items():
            view.copy_(self._state[name][index])
        integers = {name: self._state[name][index].clone() for name in self.layout.integers}
        return Payload(task.out_P, integers, len(task.dataset), metrics)


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
    total_n = 0.0
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
    masking_utils.is_tracing = lambda *_: True
    try:
        yield
    finally:
        masking_utils.is_tracing = is_tracing
