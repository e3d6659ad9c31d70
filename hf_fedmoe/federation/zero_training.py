"""Training one client by DeepSpeed."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..models import AdapterExpert
from ..weights import Payload, copy_module
from .contract import ClientTask
from .local_training import LocalTrainer, StepBatches
from .process_group import Stage
from .processes import unbroken
from .zero_engine import ZeroEngine


@dataclass
class ZeroTraining:
    """
    Trains clients by one DeepSpeed engine, which becomes the model of each in turn, with a fresh optimizer: by the
    model's own loss and [`LocalObjective.proximal_weight`]. Of an [`AdapterExpert`] the engine has the adapter; the
    frozen base stays whole, the server's, and bf16 is that of autocast.

    Args:
        local ([`LocalTrainer`]): Of one client, whose processes train it together.
        config (`dict`): Of DeepSpeed, without `"auto"`.
    """

    local: LocalTrainer
    config: dict[str, Any]

    @cached_property
    def zero(self) -> ZeroEngine:
        """Made when it is needed first."""
        local = self.local
        module = copy_module(local.worker)
        adapter = isinstance(module, AdapterExpert)
        optimizer = local.make_optimizer(module).optimizer
        # Weights in bf16 would be those of the adapter alone.
        zero = ZeroEngine(
            module, local.layout, optimizer, self.config, local.process_group.processes, autocast=adapter
        )
        if adapter and zero.partitioned:
            import deepspeed

            # The layers that run are the base's, which DeepSpeed does not see: the adapter is fetched as a whole.
            for parameter in module.parameters():
                deepspeed.zero.register_external_parameter(module, parameter)
        self._scale = 1.0
        self._pulled = torch.zeros((), device=local.accelerator.device)
        if local.strategy.proximal_weight:
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    parameter.register_hook(lambda grad, p=parameter, n=name: self._pull(grad, p, n))
        return zero

    def fit(self, task: ClientTask) -> tuple[Payload, dict[str, Tensor]]:
        """Trains a client; gives its upload, and nothing that stays with it."""
        local = self.local
        plan = local.plan(task.dataset, task.seed)
        self._begin(task, len(plan))
        total = torch.zeros((), device=local.accelerator.device)
        for batches in local.steps(task.dataset, plan, task.seed):
            total += self._step(batches)
        local.process_group.agree(Stage.UPLOAD)
        with unbroken("DeepSpeed"):
            local.process_group.processes.all_reduce_(total)
            integers = self.zero.read(task.out_P)
        metrics = {"loss": (total / len(plan)).item(), "steps": len(plan)}
        return Payload(task.out_P, integers, len(task.dataset), metrics), {}

    def _begin(self, task: ClientTask, num_steps: int) -> None:
        """The engine becomes what a client received."""
        self.local.process_group.agree(Stage.BEGIN)
        with unbroken("DeepSpeed"):
            self._received = self.local.layout.views(task.received_P)
            optimizer = self.zero.begin(task.received_P, task.integers)
            self._scheduler = self.local.make_scheduler(optimizer, num_steps)

    def _step(self, batches: StepBatches) -> Tensor:
        """Takes one optimizer step; returns this process's share of the mean loss."""
        batches = batches.kept()
        # From here on nothing depends on a client's data alone.
        self.local.process_group.agree(Stage.STEP)
        with unbroken("DeepSpeed"):
            total = self._backward_and_update(batches)
        if self.zero.engine.optimizer.overflow:
            raise ValueError("a gradient is not finite")
        return total

    def _backward_and_update(self, batches: StepBatches) -> Tensor:
        engine, count = self.zero.engine, len(batches.weights)
        processes = self.local.process_group.processes
        total = torch.zeros((), device=self.local.accelerator.device)
        for index, (batch, weight) in enumerate(zip(batches, batches.weights, strict=True)):
            engine.set_gradient_accumulation_boundary(index == count - 1)
            batch = {name: self._cast(tensor) for name, tensor in batch.items()}
            value = engine(**batch).loss.float()
            total += value.detach() * weight / count
            # DeepSpeed takes the mean over processes, where the sum of their shares is wanted.
            self._scale = weight * processes.count / count
            engine.backward(value * self._scale, scale_wrt_gas=False)
        engine.step()
        self._scheduler.step()
        total += self._pulled / processes.count
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
            weight = self._scale * self.local.strategy.proximal_weight
            self._pulled += weight / 2 * moved.float().square().sum()
            return grad + weight * moved.to(grad)
