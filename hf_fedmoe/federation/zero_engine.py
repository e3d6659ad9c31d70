"""A DeepSpeed engine whose weights are exchanged for others again and again."""

import os
from typing import Any

import torch
from torch import Tensor, nn

from ..weights import StateLayout
from .processes import Processes


class ZeroEngine:
    """
    One DeepSpeed engine that trains one model after another, each with a fresh optimizer. ZeRO (Rajbhandari et al.
    2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models") shares out what training needs over
    the processes: optimizer state (stage 1), gradients (2) and parameters (3).

    Args:
        module (`nn.Module`): Taken over.
        layout ([`StateLayout`]): Of `module`.
        optimizer (`torch.optim.Optimizer`): Over its parameters.
        config (`dict`): Of DeepSpeed, without `"auto"`.
        processes ([`Processes`]): That train together.
        autocast (`bool`, *optional*, defaults to `False`): Whether the configuration's bf16 is that of autocast, over
            weights in fp32, and not that of the weights.
    """

    def __init__(
        self,
        module: nn.Module,
        layout: StateLayout,
        optimizer: torch.optim.Optimizer,
        config: dict[str, Any],
        processes: Processes,
        autocast: bool = False,
    ):
        if processes.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed  # an extra

        deepspeed.init_distributed(auto_mpi_discovery=False)
        self.layout, self.processes = layout, processes
        if autocast and config["bf16"]["enabled"]:
            # Inside of the engine, which ends autocast that begins outside.
            module.forward = torch.autocast(processes.device.type, torch.bfloat16)(module.forward)
            config = config | {"bf16": {"enabled": False}}
        self.engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        self.partitioned = self.engine.zero_optimization_stage() == 3
        # Of the groups that are left: DeepSpeed drops empty ones.
        self._rates = [group["lr"] for group in optimizer.param_groups]

    def begin(self, row_P: Tensor, integers: dict[str, Tensor]) -> torch.optim.Optimizer:
        """The model becomes that of a row; returns its optimizer, fresh, with the learning rates that it had first."""
        self._write(row_P, integers)
        optimizer = self.engine.optimizer.optimizer
        optimizer.state.clear()
        # Stages 1 and 2 would hold on to the state of the first model.
        self.engine.optimizer._hp_optimizer_states_linked = False
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate
        self.engine.train()
        return optimizer

    @torch.no_grad()
    def read(self, out_P: Tensor) -> dict[str, Tensor]:
        """Writes the fp32 weights of the optimizer to a row; returns the integer buffers."""
        from deepspeed.utils import safe_get_full_fp32_param

        state = self.engine.module.state_dict(keep_vars=True)
        for name, view in self.layout.views(out_P).items():
            tensor = state[name]
            view.copy_(safe_get_full_fp32_param(tensor) if isinstance(tensor, nn.Parameter) else tensor)
        return self.layout.read_integers(self.engine.module)

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
            elif self.partitioned:
                with zero.GatheredParameters([tensor], modifier_rank=0):
                    tensor.copy_(view)
                size, index = safe_get_local_fp32_param(tensor).numel(), self.processes.index
                padded = nn.functional.pad(view.flatten(), (0, size * self.processes.count - view.numel()))
                safe_set_local_fp32_param(tensor, padded[index * size : (index + 1) * size])
            else:
                tensor.copy_(view)
                safe_set_full_fp32_param(tensor, view)
        self.layout.write_integers(integers, self.engine.module)
