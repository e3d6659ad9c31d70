"""
Local training by DeepSpeed. ZeRO (Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion
Parameter Models") shares out what training needs over the processes that train a client together: optimizer state
(stage 1), gradients (2) and parameters (3).

Shape suffixes: P elements of a model's row.
"""

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..models import AdapterExpert
from ..weights import Payload, copy_module
from .local_training import LocalTrainer, Loss, StepBatches
from .team import Stage


if TYPE_CHECKING:  # an extra
    from deepspeed import DeepSpeedEngine


class EngineError(BaseException):
    """
    DeepSpeed failed in one process, and the others may wait for it in a collective. The run has to end, so this is
    none of the exceptions that are taken for a failing client.
    """


@contextmanager
def unbroken() -> Iterator[None]:
    """What must succeed in all processes."""
    try:
        yield
    except Exception as error:
        raise EngineError(f"DeepSpeed failed, {type(error).__name__}: {error}") from error


@dataclass
class ZeroTrainer(LocalTrainer):
    """
    A [`LocalTrainer`] whose clients are trained by one DeepSpeed engine, which becomes the model of each in turn, with
    a fresh optimizer. It trains by the model's own loss and [`~strategies.Strategy.pull`]. Of an [`AdapterExpert`] the
    engine has the adapter; the frozen base stays whole, the server's, and bf16 is that of autocast.

    Only while processes train together: alone, a client is trained in the worker as ever.

    Args:
        config (`dict`): Of DeepSpeed, without `"auto"`.
    """

    config: dict[str, Any] = field(kw_only=True)

    @cached_property
    def engine(self) -> "DeepSpeedEngine":
        """Made when it is needed first."""
        if self.accelerator.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        deepspeed.init_distributed(auto_mpi_discovery=False)
        module, config = copy_module(self.worker), self.config
        adapter = isinstance(module, AdapterExpert)
        if adapter and config["bf16"]["enabled"]:
            # Weights in bf16 would be those of the adapter alone, and DeepSpeed ends autocast that begins outside.
            module.forward = torch.autocast(self.accelerator.device.type, torch.bfloat16)(module.forward)
            config = config | {"bf16": {"enabled": False}}
        optimizer = self.make_optimizer(module).optimizer
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        if adapter and engine.zero_optimization_stage() == 3:
            # The layers that run are the base's, which DeepSpeed does not see: the adapter is fetched as a whole.
            for parameter in module.parameters():
                deepspeed.zero.register_external_parameter(module, parameter)
        self._rates = [group["lr"] for group in optimizer.param_groups]
        self._scale = 1.0
        self._pulled = torch.zeros((), device=self.accelerator.device)
        if self.strategy.pull:
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    parameter.register_hook(lambda grad, p=parameter, n=name: self._pull(grad, p, n))
        return engine

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
        with unbroken():
            self._write(row_P, integers)
            self._received = self.layout.views(row_P)
            optimizer = self.engine.optimizer.optimizer
            optimizer.state.clear()
            # Stages 1 and 2 would hold on to the state of the first client.
            self.engine.optimizer._hp_optimizer_states_linked = False
            for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate
            self._scheduler = self.make_scheduler(optimizer, num_steps)
            self.engine.train()

    def step(self, batches: StepBatches, loss: Loss) -> Tensor:
        """One optimizer step; returns this process's share of the mean loss."""
        if not self.team.at_work:
            return super().step(batches, loss)
        batches = batches.kept()
        # From here on nothing depends on a client's data alone.
        self.team.agree(Stage.STEP)
        with unbroken():
            total = self._step(batches)
        if self.engine.optimizer.overflow:
            raise ValueError("a gradient is not finite")
        return total

    def _step(self, batches: StepBatches) -> Tensor:
        total = torch.zeros((), device=self.accelerator.device)
        count = len(batches.weights)
        for index, (batch, weight) in enumerate(zip(batches, batches.weights, strict=True)):
            self.engine.set_gradient_accumulation_boundary(index == count - 1)
            batch = {name: self._cast(tensor) for name, tensor in batch.items()}
            value = self.engine(**batch).loss.float()
            total += value.detach() * weight / count
            # DeepSpeed takes the mean over processes, where the sum of their shares is wanted.
            self._scale = weight * self.team.processes.count / count
            self.engine.backward(value * self._scale, scale_wrt_gas=False)
        self.engine.step()
        self._scheduler.step()
        total += self._pulled / self.team.processes.count
        self._pulled.zero_()
        return total

    def _cast(self, tensor: Tensor) -> Tensor:
        """DeepSpeed's half precision is that of the weights, to which floating-point inputs must be cast."""
        bf16 = tensor.is_floating_point() and self.engine.bfloat16_enabled()
        return tensor.bfloat16() if bf16 else tensor

    def _pull(self, grad: Tensor, parameter: nn.Parameter, name: str) -> Tensor:
        """Adds that of mu / 2 ||w - w_received||^2 to a parameter's gradient; called while the parameter is whole."""
        with torch.no_grad():
            moved = parameter.detach() - self._received[name]
            self._pulled += self._scale * self.strategy.pull / 2 * moved.float().square().sum()
            return grad + self._scale * self.strategy.pull * moved.to(grad)

    def payload(self, out_P: Tensor, num_examples: int, total_loss: Tensor, num_steps: int) -> Payload:
        if not self.team.at_work:
            return super().payload(out_P, num_examples, total_loss, num_steps)
        self.team.agree(Stage.UPLOAD)
        with unbroken():
            self.team.processes.sum_(total_loss)
            self._read(out_P)
            integers = self.layout.read_integers(self.engine.module)
        metrics = {"loss": (total_loss / num_steps).item(), "steps": num_steps}
        return Payload(out_P, integers, num_examples, metrics)

    @torch.no_grad()
    def _write(self, row_P: Tensor, integers: dict[str, Tensor]) -> None:
        """The engine's weights, and the fp32 ones of its optimizer, become those of a row."""
        from deepspeed import zero
        from deepspeed.utils import safe_get_local_fp32_param, safe_set_full_fp32_param, safe_set_local_fp32_param

        state = self.engine.module.state_dict(keep_vars=True)
        for name, view in self.layout.views(row_P).items():
            tensor = state[name]
            if not isinstance(tensor, nn.Parameter):
                tensor.copy_(view)
            elif self._partitioned:
                with zero.GatheredParameters([tensor], modifier_rank=0):
                    tensor.copy_(view)
                size, index = safe_get_local_fp32_param(tensor).numel(), self.team.processes.index
                padded = nn.functional.pad(view.flatten(), (0, size * self.team.processes.count - view.numel()))
                safe_set_local_fp32_param(tensor, padded[index * size : (index + 1) * size])
            else:
                tensor.copy_(view)
                safe_set_full_fp32_param(tensor, view)
        self.layout.write_integers(integers, self.engine.module)

    @torch.no_grad()
    def _read(self, out_P: Tensor) -> None:
        """The fp32 weights of the engine's optimizer as a row."""
        from deepspeed.utils import safe_get_full_fp32_param

        state = self.engine.module.state_dict(keep_vars=True)
        for name, view in self.layout.views(out_P).items():
            tensor = state[name]
            view.copy_(safe_get_full_fp32_param(tensor) if isinstance(tensor, nn.Parameter) else tensor)

    @property
    def _partitioned(self) -> bool:
        return self.engine.zero_optimization_stage() == 3
