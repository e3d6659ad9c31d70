"""Training a gate that is a model of its own by DeepSpeed."""

import inspect
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from ..federation import Processes, ZeroEngine
from ..models import FedMoEPreTrainedModel
from ..weights import StateLayout, copy_module
from .gate_training import GateFit


class GateAndAlpha(nn.Module):
    """The part of a mixture that the server trains on the experts' outputs."""

    def __init__(self, gate: nn.Module, alpha_logit: nn.Parameter):
        super().__init__()
        self.gate, self.alpha_logit = gate, alpha_logit

    def forward(self, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Scores `[b, K]`, and alpha's logit as a tensor that is whole outside of this module."""
        return self.gate(**inputs, return_dict=True).logits, self.alpha_logit.clone()


class ZeroGateFit(GateFit):
    """
    A [`GateFit`] by a DeepSpeed engine; its weights are in fp32, and bf16 is that of autocast.

    Args:
        model ([`~models.FedMoEPreTrainedModel`]): The mixture; its gate is a model of its own.
        processes ([`Processes`]): Those that train the gate together.
        config (`dict`): Of DeepSpeed, without `"auto"`.
    """

    def __init__(self, model: FedMoEPreTrainedModel, processes: Processes, config: dict[str, Any]):
        super().__init__(model, processes)
        self.config = config
        self._trained = GateAndAlpha(model.gate, model.alpha_logit)
        self._inputs = inspect.signature(model.gate.forward).parameters

    @cached_property
    def zero(self) -> ZeroEngine:
        """Made when it is needed first."""
        module = copy_module(self._trained)
        assert isinstance(module, GateAndAlpha)
        own = {"gradient_clipping": 1.0, "gradient_accumulation_steps": 1}
        optimizer = AdamW([{"params": list(module.gate.parameters())}, {"params": [module.alpha_logit]}])
        return ZeroEngine(module, StateLayout.of(module), optimizer, self.config | own, self._processes, autocast=True)

    def begin(self, learning_rate: float, weight_decay: float) -> None:
        layout = self.zero.layout
        row_P, integers = layout.read(self._trained), layout.read_integers(self._trained)
        optimizer = self.zero.begin(row_P, integers)
        for group, decay in zip(optimizer.param_groups, (weight_decay, 0.0), strict=True):
            group["lr"], group["weight_decay"] = learning_rate, decay

    def gate_logits(self, batch: dict[str, Tensor]) -> Tensor:
        inputs = {name: tensor for name, tensor in batch.items() if name in self._inputs}
        logits_bK, self._alpha_logit = self.zero.engine(**inputs)
        return logits_bK

    @property
    def alpha(self) -> Tensor:
        # Its gradient is that of the whole batch in each process, and they are added up.
        whole = self._alpha_logit.detach()
        return (whole + (self._alpha_logit - whole) / self.count).sigmoid()

    def step(self, objective: Tensor) -> Tensor:
        engine = self.zero.engine
        # DeepSpeed takes the mean over processes, where the sum is wanted.
        engine.backward(objective * self.count)
        engine.step()
        return torch.as_tensor(engine.get_global_grad_norm(), device=objective.device)

    def end(self) -> None:
        layout = self.zero.layout
        row_P = layout.read(self._trained)
        integers = self.zero.read(row_P)
        layout.write(row_P, self._trained)
        layout.write_integers(integers, self._trained)
