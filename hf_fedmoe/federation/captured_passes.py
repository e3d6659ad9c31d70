"""
Forward and backward passes of a client's model, replayed as CUDA graphs. A pass of a small model is some hundred
launches, which take the host longer than the GPU takes for what they launch; a graph is one.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils import logging

from . import cuda_graph
from .cuda_graph import CudaGraph, new_pool
from .objective import own_loss


logger = logging.get_logger(__name__)

# No more shapes than this are captured: what is rare does not pay.
MOST_GRAPHS = 16
# Of the gradient's norm. A replay that differs by more than rounding, in bf16 too, is not used.
TOLERANCE = 0.05

Pass = Callable[[Callable, dict[str, Tensor], float, int], Tensor]


@dataclass(eq=False)
class CapturedPass:
    """
    A captured pass.

    Args:
        batch (`dict[str, Tensor]`): The memory that batches are copied to.
        value (`Tensor`): Where the loss appears.
        grads (`dict[nn.Parameter, Tensor]`): The memory that gradients are added to, of the parameters that get one.
        addresses (`list[int]`): Of all parameters; a module whose memory has moved needs another graph.
        graph ([`CudaGraph`]): Of the pass.
    """

    batch: dict[str, Tensor]
    value: Tensor
    grads: dict[nn.Parameter, Tensor]
    addresses: list[int]
    graph: CudaGraph

    def replay(self, batch: dict[str, Tensor]) -> Tensor:
        """Adds the gradients of a batch; returns the loss, until the next replay."""
        for name, tensor in batch.items():
            self.batch[name].copy_(tensor)
        into_memory_(self.grads)
        self.graph.replay()
        return self.value


@dataclass
class CapturedPasses:
    """
    Takes forward and backward passes, by CUDA graphs where that is the same: passes of shapes that have come before,
    whose replay has been compared with the plain pass. All others are plain.

    Args:
        worker (`nn.Module`): The client's model, whose tensors stay where they are.
        plain (`Callable`): Of (loss, batch, weight, count), adds the gradients of `loss * weight / count` and returns
            that.
        whole (`Callable`): Makes the context of what must not be left half done, [`ClientClock.whole`].
        grads (`dict[nn.Parameter, Tensor]`): The memory of gradients, filled here.
        loss (`Callable`): The only one whose passes are captured. What another does on the host, one of the user's
            own perhaps, would happen at the capture only.
    """

    worker: nn.Module
    plain: Pass
    whole: Callable[[], AbstractContextManager[None]]
    grads: dict[nn.Parameter, Tensor]
    loss: Callable = own_loss
    _seen: Counter = field(default_factory=Counter, init=False)
    _captured: dict[tuple, CapturedPass | None] = field(default_factory=dict, init=False)
    _pool: Any = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._parameters = list(self.worker.parameters())

    def __call__(self, loss: Callable, batch: dict[str, Tensor], weight: float, count: int) -> Tensor:
        """Adds the gradients of `loss * weight / count` of a batch and returns that."""
        if loss is not self.loss:
            return self.plain(loss, batch, weight, count)
        shapes = tuple((name, t.shape, t.dtype, t.stride()) for name, t in sorted(batch.items()))
        learning = tuple(parameter.requires_grad for parameter in self._parameters)
        key = (shapes, weight, count, self.worker.training, learning)
        if key not in self._captured:
            self._seen[key] += 1
            if self._seen[key] < cuda_graph.TIMES_SEEN or self._count() == MOST_GRAPHS:
                return self.plain(loss, batch, weight, count)
            with self.whole():
                return self._capture(key, loss, batch, weight, count)
        captured = self._captured[key]
        if captured is None:
            return self.plain(loss, batch, weight, count)
        if captured.addresses != [parameter.data_ptr() for parameter in self._parameters]:
            del self._captured[key]
            return self.plain(loss, batch, weight, count)
        return captured.replay(batch)

    def _count(self) -> int:
        return sum(captured is not None for captured in self._captured.values())

    def _capture(self, key: tuple, loss: Callable, batch: dict[str, Tensor], weight: float, count: int) -> Tensor:
        """Takes a plain pass, captures its like, and keeps the graph if its replay gives the same."""
        # Copies: they may be the very memory that the graph writes to.
        before = {p: None if p.grad is None else p.grad.clone() for p in self._parameters}
        buffers = {buffer: buffer.clone() for buffer in self.worker.buffers()}
        random_state = _random_state(self._parameters[0].device)
        self._go_back(buffers, None)
        value = self.plain(loss, batch, weight, count).clone()
        found = {parameter: parameter.grad for parameter in self._parameters if parameter.grad is not None}
        after, state_after = [buffer.clone() for buffer in buffers], _random_state(self._parameters[0].device)
        try:
            if state_after.host != random_state.host:
                raise RuntimeError("the model draws random numbers on the host")
            if any(buffer is not own for buffer, own in zip(self.worker.buffers(), buffers, strict=True)):
                raise RuntimeError("the model puts other tensors in the place of its buffers")
            self._go_back(buffers, random_state)
            captured = self._recorded(found, loss, batch, weight, count)
            self._go_back(buffers, random_state)
            replayed = captured.replay(batch)
            self._check(found, value, captured.grads, replayed)
            self._captured[key] = captured
        except Exception as error:  # whatever it is, the plain pass was right
            logger.info(f"Passes of the shapes {dict(s[:2] for s in key[0])} are not replayed as CUDA graphs: {error}")
            self._captured[key] = None
        with torch.no_grad():
            for buffer, own in zip(buffers, after, strict=True):
                buffer.copy_(own)
            _set_random_state(state_after)
            for parameter, grad in before.items():
                taken = found.get(parameter)
                parameter.grad = taken if grad is None else grad if taken is None else grad.add_(taken)
        return value

    def _recorded(
        self, found: dict[nn.Parameter, Tensor], loss: Callable, batch: dict[str, Tensor], weight: float, count: int
    ) -> CapturedPass:
        """Captures the pass of a batch."""
        grads = memory_of(found, self.grads)
        own = {name: tensor.clone() for name, tensor in batch.items()}
        value = torch.zeros((), device=self._parameters[0].device)

        def work() -> None:
            for parameter, grad in grads.items():
                parameter.grad = grad
            value.copy_(self.plain(loss, own, weight, count))

        if self._pool is None:
            self._pool = new_pool()
        graph = CudaGraph(work, self._pool)
        return CapturedPass(own, value, grads, [parameter.data_ptr() for parameter in self._parameters], graph)

    @torch.no_grad()
    def _go_back(self, buffers: dict[Tensor, Tensor], random_state: "_RandomState | None") -> None:
        """Forgets what a pass has left in buffers and gradients, and what it drew."""
        for buffer, own in buffers.items():
            buffer.copy_(own)
        for parameter in self._parameters:
            parameter.grad = None
        if random_state is not None:
            _set_random_state(random_state)

    def _check(
        self, found: dict[nn.Parameter, Tensor], value: Tensor, grads: dict[nn.Parameter, Tensor], replayed: Tensor
    ) -> None:
        """Raises `RuntimeError` unless the replay has the loss and the gradients of the plain pass."""
        differences = [found[parameter] - grad for parameter, grad in grads.items()]
        norm, off = (torch.stack(torch._foreach_norm(list(t))).norm() for t in (found.values(), differences))
        found_value, other = value.item(), replayed.item()
        if not (off <= TOLERANCE * norm and abs(other - found_value) <= TOLERANCE * max(abs(found_value), 1e-3)):
            raise RuntimeError(
                f"the loss is {found_value:.6g} and replayed {other:.6g}, the gradient's norm {norm.item():.6g} and "
                f"that of the difference {off.item():.6g}"
            )


def memory_of(parameters: Iterable[nn.Parameter], grads: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
    """Returns the memory of some parameters' gradients, which `grads` has afterwards."""
    for parameter in parameters:
        if parameter not in grads:
            grads[parameter] = torch.zeros_like(parameter)
    return {parameter: grads[parameter] for parameter in parameters}


def into_memory_(grads: dict[nn.Parameter, Tensor]) -> None:
    """Brings the parameters' gradients into their memory: zeros where there is none."""
    fresh = []
    for parameter, grad in grads.items():
        if parameter.grad is None:
            fresh.append(grad)
        elif parameter.grad is not grad:
            grad.copy_(parameter.grad)
        parameter.grad = grad
    if fresh:
        torch._foreach_zero_(fresh)


@dataclass
class _RandomState:
    """State of the random generators of host and device."""

    device: torch.device
    own: Tensor
    host: tuple[Any, ...]


def _random_state(device: torch.device) -> _RandomState:
    state = np.random.get_state(legacy=False)["state"]
    host = (random.getstate(), state["key"].tobytes(), state["pos"])
    if device.type != "cuda":
        return _RandomState(device, torch.get_rng_state(), host)
    return _RandomState(device, torch.cuda.get_rng_state(device), (*host, torch.get_rng_state().numpy().tobytes()))


def _set_random_state(state: _RandomState) -> None:
    if state.device.type == "cuda":
        torch.cuda.set_rng_state(state.own, state.device)
    else:
        torch.set_rng_state(state.own)
