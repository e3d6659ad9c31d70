"""
A client's optimizer steps: gradients are clipped, weights move, gradients are gone. On a GPU all that is some dozens
of launches and much of Python, which a CUDA graph replays as one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from . import cuda_graph
from .captured_passes import into_memory_, memory_of
from .cuda_graph import CudaGraph, new_pool


logger = logging.get_logger(__name__)

OPTIMIZER_PREFIX = "optimizer."
# Of the norm of the step. A replay that differs by more than rounding is not used.
TOLERANCE = 0.01


@dataclass
class LocalUpdates:
    """
    Takes an optimizer's steps.

    Args:
        optimizer (`torch.optim.Optimizer`): Of one client after another, reset for each.
        clip (`Callable`): Clips the gradients, if that is asked for.
    """

    optimizer: torch.optim.Optimizer
    clip: Callable[[], None]

    def __post_init__(self) -> None:
        self._learning_rates = [group["lr"] for group in self.optimizer.param_groups]

    def __call__(self) -> None:
        """Takes a step; the gradients are gone."""
        self.clip()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def reset(self, kept: dict[str, Tensor] | None) -> None:
        """Makes the optimizer a fresh one, or that of the last round by [`LocalUpdates.tensors`]."""
        state = self.optimizer.state_dict()
        state["state"] = {}
        for number, key, tensor in _entries(kept):
            state["state"].setdefault(number, {})[key] = tensor
        for group, learning_rate in zip(state["param_groups"], self._learning_rates, strict=True):
            group["lr"] = learning_rate
        self.optimizer.load_state_dict(state)

    def tensors(self) -> dict[str, Tensor]:
        """Returns copies of the optimizer's state as named tensors."""
        return {
            f"{OPTIMIZER_PREFIX}{index}.{key}": value.detach().clone()
            for index, entries in self.optimizer.state_dict()["state"].items()
            for key, value in entries.items()
            if isinstance(value, Tensor)
        }


@dataclass
class CapturedUpdates(LocalUpdates):
    """
    Takes the steps of an optimizer of PyTorch's as replays of a CUDA graph, once one has been compared with a plain
    step. A step of other gradients or settings than the captured one is plain.

    Args:
        grads (`dict[nn.Parameter, Tensor]`): The memory of gradients, see [`CapturedPasses`].
    """

    grads: dict[nn.Parameter, Tensor]
    _seen: int = field(default=0, init=False)
    _tried: bool = field(default=False, init=False)
    _captured: "_CapturedUpdate | None" = field(default=None, init=False)

    def __call__(self) -> None:
        captured = self._captured
        if captured is not None and captured.fits():
            return captured.replay()
        if not self._tried and _can_be_captured(self.optimizer):
            self._seen += 1
            if self._seen >= cuda_graph.TIMES_SEEN and self._has_state():
                return self._capture()
        super().__call__()

    def reset(self, kept: dict[str, Tensor] | None) -> None:
        if self._captured is None:
            return super().reset(kept)
        for group, learning_rate in zip(self.optimizer.param_groups, self._learning_rates, strict=True):
            group["lr"] = learning_rate
        self._captured.reset(kept)

    def _has_state(self) -> bool:
        """Tells whether the optimizer has the state of a step after its first."""
        needed = any(group.get("betas") or group.get("momentum") for group in self.optimizer.param_groups)
        learning = (parameter for parameter in _parameters(self.optimizer) if parameter.grad is not None)
        return not needed or all(self.optimizer.state.get(parameter) for parameter in learning)

    @torch.no_grad()
    def _capture(self) -> None:
        """Takes a plain step, captures its like, and keeps the graph if its replay gives the same."""
        self._tried, optimizer = True, self.optimizer
        given = {parameter: parameter.grad for parameter in _parameters(optimizer) if parameter.grad is not None}
        _to_device(optimizer)
        parameters, gradients = list(given), [grad.clone() for grad in given.values()]
        before = _Snapshot.of(optimizer, parameters)
        super().__call__()
        after = _Snapshot.of(optimizer, parameters)
        try:
            before.restore()
            captured = _CapturedUpdate.of(optimizer, self.clip, memory_of(parameters, self.grads))
            before.restore()
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            captured.replay()
            step, off = (
                torch.stack(torch._foreach_norm([a - b for a, b in zip(after.weights, others, strict=True)])).norm()
                for others in (before.weights, parameters)
            )
            if not off <= TOLERANCE * step:
                raise RuntimeError(f"its step has the norm {step.item():.6g} and replayed is off by {off.item():.6g}")
            self._captured = captured
        except Exception as error:  # whatever it is, the plain step was right
            logger.info(f"Steps of {type(optimizer).__name__} are not replayed as a CUDA graph: {error}")
        after.restore()
        for parameter in parameters:
            parameter.grad = None


def _entries(kept: dict[str, Tensor] | None) -> Iterator[tuple[int, str, Tensor]]:
    """Gives the entries of what [`LocalUpdates.tensors`] returned: number of the parameter, name, value."""
    for name, tensor in (kept or {}).items():
        _, number, key = name.split(".")
        yield int(number), key, tensor


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _can_be_captured(optimizer: torch.optim.Optimizer) -> bool:
    """Tells whether a fresh state of the optimizer is one of zeros, and its rate may be a tensor."""
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return False
    groups = optimizer.param_groups
    if not all(isinstance(group["lr"], float) for group in groups):
        return False
    if type(optimizer) is torch.optim.SGD:
        return not any(group["dampening"] or group["differentiable"] for group in groups)
    plain = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)
    return plain and not any(group["amsgrad"] or group["differentiable"] for group in groups)


def _to_device(optimizer: torch.optim.Optimizer) -> None:
    """Has Adam count its steps on the device, which a graph needs."""
    for group in optimizer.param_groups:
        if "capturable" in group:
            group["capturable"] = True
    for parameter, entries in optimizer.state.items():
        if "step" in entries:
            entries["step"] = entries["step"].to(parameter.device)


@dataclass
class _Snapshot:
    """Copies of weights and of an optimizer's state."""

    parameters: list[nn.Parameter]
    weights: list[Tensor]
    state: list[Tensor]
    copies: list[Tensor]

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> "_Snapshot":
        """Copies what a step changes."""
        state = [t for p in parameters for t in optimizer.state[p].values() if isinstance(t, Tensor)]
        return cls(parameters, [p.detach().clone() for p in parameters], state, [t.clone() for t in state])

    @torch.no_grad()
    def restore(self) -> None:
        """Writes all of it back."""
        for tensor, copy in (
            *zip(self.parameters, self.weights, strict=True),
            *zip(self.state, self.copies, strict=True),
        ):
            tensor.copy_(copy)


@dataclass
class _CapturedUpdate:
    """
    A captured step.

    Args:
        optimizer (`torch.optim.Optimizer`): Whose step it is.
        grads (`dict[nn.Parameter, Tensor]`): The memory of the gradients that it reads.
        state (`dict[nn.Parameter, dict[str, Tensor]]`): The optimizer's state, whose memory it changes.
        rates (`list[Tensor]`): The learning rate of each group.
        values (`list[float]`): Their values.
        settings (`list[dict]`): All other settings of the groups.
        addresses (`list[int]`): Of the weights.
        graph ([`CudaGraph`]): Of the step.
    """

    optimizer: torch.optim.Optimizer
    grads: dict[nn.Parameter, Tensor]
    state: dict[nn.Parameter, dict[str, Tensor]]
    rates: list[Tensor]
    values: list[float]
    settings: list[dict[str, Any]]
    addresses: list[int]
    graph: CudaGraph

    @classmethod
    def of(
        cls, optimizer: torch.optim.Optimizer, clip: Callable[[], None], grads: dict[nn.Parameter, Tensor]
    ) -> "_CapturedUpdate":
        """Captures a step; weights and state are others afterwards."""
        groups, settings = optimizer.param_groups, _settings(optimizer)
        values = [group["lr"] for group in groups]
        device = next(iter(grads)).device
        rates = [torch.tensor(value, dtype=torch.float32, device=device) for value in values]
        # Of SGD only the fused step takes its rate from the device.
        changes = {"fused": True, "foreach": False} if type(optimizer) is torch.optim.SGD else {}

        def work() -> None:
            for group, rate in zip(groups, rates, strict=True):
                group.update(changes, lr=rate)
            try:
                for parameter, grad in grads.items():
                    parameter.grad = grad
                clip()
                optimizer.step()
            finally:
                for group, value, own in zip(groups, values, settings, strict=True):
                    group.update({name: own[name] for name in changes}, lr=value)

        graph = CudaGraph(work, new_pool())
        state = {parameter: dict(optimizer.state[parameter]) for parameter in grads if optimizer.state.get(parameter)}
        return cls(optimizer, grads, state, rates, values, settings, [p.data_ptr() for p in grads], graph)

    def fits(self) -> bool:
        """Tells whether a step of the optimizer now would be the captured one, for other numbers."""
        with_gradients = [p.data_ptr() for p in _parameters(self.optimizer) if p.grad is not None]
        return with_gradients == self.addresses and _settings(self.optimizer) == self.settings

    @torch.no_grad()
    def replay(self) -> None:
        """Takes the step; the gradients are gone."""
        for index, (group, rate) in enumerate(zip(self.optimizer.param_groups, self.rates, strict=True)):
            if group["lr"] != self.values[index]:
                self.values[index] = group["lr"]
                rate.fill_(group["lr"])
        into_memory_(self.grads)
        self.graph.replay()
        # Not zeros: a parameter that the next pass does not reach must be left as it is.
        for parameter in self.grads:
            parameter.grad = None

    @torch.no_grad()
    def reset(self, kept: dict[str, Tensor] | None) -> None:
        """Makes the state that of a fresh optimizer, or another, in the same memory."""
        self.optimizer.state.clear()
        for parameter, own in self.state.items():
            self.optimizer.state[parameter] = own
        tensors = [tensor for entries in self.state.values() for tensor in entries.values()]
        if tensors:
            torch._foreach_zero_(tensors)
        numbered = _parameters(self.optimizer)
        for number, key, tensor in _entries(kept):
            parameter = numbered[number]
            if parameter in self.state:
                self.state[parameter][key].copy_(tensor)
            else:
                self.optimizer.state[parameter][key] = tensor.to(parameter.device, copy=True)


def _settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Returns the groups' settings besides their rates."""
    left_out = ("params", "lr", "initial_lr")
    return [{name: v for name, v in group.items() if name not in left_out} for group in optimizer.param_groups]
