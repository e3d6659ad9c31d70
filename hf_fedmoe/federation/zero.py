"""Local training by DeepSpeed."""

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..models import AdapterExpert
from ..weights import Payload, copy_module
from .local_training import LocalTrainer, Loss, StepBatches
from .processes import unbroken
from .team import Stage
from .zero_engine import ZeroEngine


@dataclass
class ZeroTrainer(LocalTrainer):
    """
    A [`LocalTrainer`] whose clients are trained by one DeepSpeed engine, which becomes the model of each in turn, with
    a fresh optimizer. It trains by the model's own loss and [`LocalObjective.proximal_weight`]. Of an
    [`AdapterExpert`] the engine has the adapter; the frozen base stays whole, the server's, and bf16 is that
    of autocast.

    Only while processes train together: alone, a client is trained in the worker as ever.

    Args:
        config (`dict`): Of DeepSpeed, without `"auto"`.
    """

    config: dict[str, Any] = field(kw_only=True)

    @cached_property
    def zero(self) -> ZeroEngine:
        """Made when it is needed first."""
        module = copy_module(self.worker)
        adapter = isinstance(module, AdapterExpert)
        optimizer = self.make_optimizer(module).optimizer
        # Weights in bf16 would be those of the adapter alone.
        zero = ZeroEngine(module, self.layout, optimizer, self.config, self.team.processes, autocast=adapter)
        if adapter and zero.partitioned:
            import deepspeed

            # The layers that run are the base's, which DeepSpeed does not see: the adapter is fetched as a whole.
            for parameter in module.parameters():
                deepspeed.zero.register_external_parameter(module, parameter)
        self._scale = 1.0
        self._pulled = torch.zeros((), device=self.accelerator.device)
        if self.strategy.proximal_weight:
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    parameter.register_hook(lambda grad, p=parameter, n=name: self._pull(grad, p, n))
        return zero

    def begin(
        self,
        row_P: Tensor,
        integers: dict[str, Tensor],
        num_steps: int,
        kept_optimizer: dict[str, Tensor] | None = None,
        only: Collection[str] | None = None,
    ) -> None:
        if not self.team.at_work:
            return super().begin(row_P, integers, num_steps, kept_optimizer, only)
        self.team.agree(Stage.BEGIN)
        with unbroken("DeepSpeed"):
            self._received = self.layout.views(row_P)
            optimizer = self.zero.begin(row_P, integers)
            self._scheduler = self.make_scheduler(optimizer, num_steps)

    def step(self, batches: StepBatches, loss: Loss) -> Tensor:
        """One optimizer step; returns this process's share of the mean loss."""
        if not self.team.at_work:
            return super().step(batches, loss)
        batches = batches.kept()
        # From here on nothing depends on a client's data alone.
        self.team.agree(Stage.STEP)
        with unbroken("DeepSpeed"):
            total = self._step(batches)
        if self.zero.engine.optimizer.overflow:
            raise ValueError("a gradient is not finite")
        return total

    def _step(self, batches: StepBatches) -> Tensor:
        engine, count = self.zero.engine, len(batches.weights)
        total = torch.zeros((), device=self.accelerator.device)
        for index, (batch, weight) in enumerate(zip(batches, batches.weights, strict=True)):
            engine.set_gradient_accumulation_boundary(index == count - 1)
            batch = {name: self._cast(tensor) for name, tensor in batch.items()}
            value = engine(**batch).loss.float()
            total += value.detach() * weight / count
            # DeepSpeed takes the mean over processes, where the sum of their shares is wanted.
            self._scale = weight * self.team.processes.count / count
            engine.backward(value * self._scale, scale_wrt_gas=False)
        engine.step()
        self._scheduler.step()
        total += self._pulled / self.team.processes.count
        self._pulled.zero_()
        return total

    def _cast(self, tensor: Tensor) -> Tensor:
        """DeepSpeed's half precision is that of the weights, to which floating-point inputs must be cast."""
        bf16 = tensor.is_floating_point() and self.zero.engine.bfloat16_enabled()
        return tensor.bfloat16() if bf16 else tensor

    def _pull(self, grad: Tensor, parameter: nn.Parameter, name: str) -> Tensor:
        """Adds that of mu / 2 ||w - w_received||^2 to a parameter's gradient; called while the parameter is whole."""
        with torch.no_grad():
            moved = parameter.detach() - self._received[name]
            self._pulled += self._scale * self.strategy.proximal_weight / 2 * moved.float().square().sum()
            return grad + self._scale * self.strategy.proximal_weight * moved.to(grad)

    def payload(self, out_P: Tensor, num_examples: int, total_loss: Tensor, num_steps: int) -> Payload:
        if not self.team.at_work:
            return super().payload(out_P, num_examples, total_loss, num_steps)
        self.team.agree(Stage.UPLOAD)
        with unbroken("DeepSpeed"):
            self.team.processes.sum_(total_loss)
            integers = self.zero.read(out_P)
        metrics = {"loss": (total_loss / num_steps).item(), "steps": num_steps}
        return Payload(out_P, integers, num_examples, metrics)
