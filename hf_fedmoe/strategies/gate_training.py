"""Training the gate on the reserved set.

Shape suffixes: R reserved examples, B of a batch, b those of them that this process runs, S experts (main ones first),
K routed experts, C classes, H features.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..data import ReservedSet, has_batch_statistics, split_rows
from ..federation import CapturedPasses, CapturedUpdates, Processes, ServerStep, Track, untracked
from ..models import FedMoEPreTrainedModel
from ..models.mixture_fedmoe import dense_mixture, gating_entropy, load_imbalance
from .narrowing import as_mixture, reserved_of
from .server_training import ExpertOutputs, adamw


# Among which [`calibrated`] chooses.
TEMPERATURES = (1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0)
ALPHAS = (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95, 0.99)
# Of [`train_gate`], from `epochs` to `seed`.
GateSettings = tuple[int, float, float, int, float, float, int]


def fit_gate(step: ServerStep, cached: ExpertOutputs, *settings: *GateSettings) -> dict[str, float]:
    """[`train_gate`], by all processes if they work together and the gate is more than a layer on features."""
    if step.gate_fit is None or cached.features_RH is not None:
        model = as_mixture(step.server.model)
        fit = GateFit(model)
        if step.captured is not None and cached.features_RH is not None:
            fit = step.server.cache.setdefault("gate_fit", CapturedGateFit(model))
        return train_gate(fit, cached, reserved_of(step), *settings, step.track)
    return step.join(_fit_gate_together, {"logits_RSC": cached.logits_RSC}, settings)


def _fit_gate_together(step: ServerStep, tensors: dict[str, Tensor], settings: GateSettings) -> dict[str, float]:
    outputs = ExpertOutputs(tensors["logits_RSC"], None)
    return train_gate(step.gate_fit, outputs, reserved_of(step), *settings, step.track)


@torch.no_grad()
def calibrated(
    model: FedMoEPreTrainedModel, logits_RSC: Tensor, scores_RKN: Tensor, labels_R: Tensor
) -> tuple[float, float]:
    """
    Returns the temperature of a gate's scores, and alpha, of a few each, with which the dense mixture has the least
    cross-entropy on the reserved set. Two numbers cannot fit it by heart, so experts must not have seen it either.
    """
    config = model.config
    found = {}
    for temperature in TEMPERATURES:
        Q_RK = (scores_RKN / temperature).logsumexp(-1).softmax(-1)
        for alpha in ALPHAS:
            alpha_1 = torch.full_like(model.alpha, alpha)
            log_P_RC = dense_mixture(logits_RSC, Q_RK, alpha_1, config.num_main_experts, config.mix)
            found[temperature, alpha] = cross_entropy(log_P_RC, labels_R)
    losses = dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True))
    return min(losses, key=lambda pair: losses[pair])


class GateFit:
    """
    The gate and alpha while they are trained.

    Of several processes each runs the gate on its rows of every batch. All know what the others found, and add their
    gradients up, so that all take the steps of one process.

    Args:
        model ([`~models.FedMoEPreTrainedModel`]): The mixture.
        processes (`Processes`, *optional*): Those that train the gate together; this one alone if left out.
    """

    def __init__(self, model: FedMoEPreTrainedModel, processes: Processes | None = None):
        self.model = model
        self._processes = processes or Processes()
        self.index, self.count = self._processes.index, self._processes.count

    def begin(self, learning_rate: float, weight_decay: float) -> None:
        """A fresh optimizer; the gate learns from now on."""
        self._gate_parameters = self.model.gate_parameters()
        self._parameters = [*self._gate_parameters, self.model.alpha_logit]
        # Weight decay on alpha would pull it to one half whatever the data say.
        self._optimizer = adamw(
            [
                {"params": self._gate_parameters, "weight_decay": weight_decay},
                {"params": [self.model.alpha_logit], "weight_decay": 0.0},
            ],
            lr=learning_rate,
        )
        self.model.gate.train()

    def choices(self, reserved: ReservedSet, cached: ExpertOutputs, indices_B: Tensor) -> Tensor:
        """Q `[B, K]` of reserved examples; its gradient reaches the gate from the rows of this process."""
        if cached.features_RH is not None:
            return self.model.gate_logits(cached.features_RH[indices_B], {}).float().softmax(-1)
        rows_b = torch.arange(len(indices_B), device=indices_B.device)[self.index :: self.count]
        # One without a row runs another's, which counts nothing: the gate runs equally often in all.
        batch = reserved.batch(indices_B[rows_b] if len(rows_b) else indices_B[:1])
        batch.pop("labels")
        with reserved.autocast():
            logits_bK = self.gate_logits(batch)
        Q_bK = logits_bK.float().softmax(-1)[: len(rows_b)]
        if self.count == 1:
            return Q_bK
        Q_BK = Q_bK.new_zeros(len(indices_B), Q_bK.shape[1])
        Q_BK[rows_b] = Q_bK.detach()
        self._processes.all_reduce_(Q_BK)
        return Q_BK.index_copy(0, rows_b, Q_bK)

    def learn(
        self, reserved: ReservedSet, cached: ExpertOutputs, indices_B: Tensor, objective: "GateObjective"
    ) -> tuple[Tensor, Tensor]:
        """Takes a step on reserved examples; returns the cross-entropy before, and the gradient's norm."""
        Q_BK = self.choices(reserved, cached, indices_B)
        loss, total = objective(Q_BK, self.alpha, cached.logits_RSC[indices_B], reserved.labels_R[indices_B])
        return loss.detach(), self.step(total)

    def gate_logits(self, batch: dict[str, Tensor]) -> Tensor:
        """Scores `[b, K]` of the routed experts."""
        return self.model.gate_logits(None, batch)

    @property
    def alpha(self) -> Tensor:
        """Weight `(1,)` of the routed experts, for the choices made last."""
        return self.model.alpha

    def step(self, objective: Tensor) -> Tensor:
        """One step of the optimizer, its gradient clipped to the norm 1; returns the norm before."""
        objective.backward()
        if self.count > 1:
            # Alpha's gradient is that of the whole batch in each process.
            grads = [p.grad for p in self._gate_parameters if p.grad is not None]
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            self._processes.all_reduce_(flat)
            for grad, total in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(total.view_as(grad))
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def end(self) -> None:
        """The gate has learned."""
        self.model.gate.eval()


@dataclass(frozen=True)
class GateObjective:
    """
    The objective of the gate and alpha (Fed-MoE Eq. 7-9): L = CE(P_bar, y) + entropy_weight * GEnt +
    balance_weight * KL(mean gate || uniform).
    """

    num_main_experts: int
    mix: str
    entropy_weight: float
    balance_weight: float

    def __call__(self, Q_BK: Tensor, alpha: Tensor, logits_BSC: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the cross-entropy and L."""
        log_P_BC = dense_mixture(logits_BSC, Q_BK, alpha, self.num_main_experts, self.mix)
        loss = cross_entropy(log_P_BC, labels_B)
        entropy, imbalance = gating_entropy(Q_BK), load_imbalance(Q_BK)
        return loss, loss + self.entropy_weight * entropy + self.balance_weight * imbalance


class CapturedGateFit(GateFit):
    """
    A gate on features and alpha while they are trained, in one process on a GPU. A step is a tiny matrix product and
    some dozens of launches, which CUDA graphs replay.

    Args:
        model ([`~models.FedMoEPreTrainedModel`]): The mixture.
    """

    _updates: CapturedUpdates

    def __init__(self, model: FedMoEPreTrainedModel):
        super().__init__(model)
        self._settings: tuple[float, float] | None = None
        self._trained = nn.ModuleDict({"gate": model.gate})
        self._trained.register_parameter("alpha_logit", model.alpha_logit)
        self._trained.register_parameter("gate_bias_N", model.gate_bias_N)

    def begin(self, learning_rate: float, weight_decay: float) -> None:
        settings = (learning_rate, weight_decay)
        if settings == self._settings:
            self._updates.reset(None)
            self.model.gate.train()
            return
        super().begin(learning_rate, weight_decay)
        self._settings = settings
        grads: dict[nn.Parameter, Tensor] = {}
        self._norm = torch.zeros((), device=self.model.alpha_logit.device)
        self._updates = CapturedUpdates(self._optimizer, self._clip, grads)
        self._passes: dict[GateObjective, CapturedPasses] = {}
        self._grads = grads

    def learn(
        self, reserved: ReservedSet, cached: ExpertOutputs, indices_B: Tensor, objective: GateObjective
    ) -> tuple[Tensor, Tensor]:
        if cached.features_RH is None:
            return super().learn(reserved, cached, indices_B, objective)
        batch = {
            "features": cached.features_RH[indices_B],
            "logits": cached.logits_RSC[indices_B],
            "labels": reserved.labels_R[indices_B],
        }
        if objective not in self._passes:
            self._passes[objective] = CapturedPasses(self._trained, self._pass, nullcontext, self._grads, objective)
        take = self._passes[objective]
        loss = take(take.loss, batch, 1.0, 1)
        self._updates()
        return loss, self._norm

    def _pass(self, objective: Callable, batch: dict[str, Tensor], weight: float, count: int) -> Tensor:
        Q_BK = self.model.gate_logits(batch["features"], {}).float().softmax(-1)
        loss, total = objective(Q_BK, self.alpha, batch["logits"], batch["labels"])
        total.backward()
        return loss.detach()

    def _clip(self) -> None:
        self._norm.copy_(torch.nn.utils.clip_grad_norm_(self._parameters, 1.0))


def train_gate(
    fit: GateFit,
    cached: ExpertOutputs,
    reserved: ReservedSet,
    epochs: int,
    learning_rate: float,
    weight_decay: float,
    batch_size: int,
    entropy_weight: float,
    balance_weight: float,
    seed: int,
    track: Track = untracked,
) -> dict[str, float]:
    """
    Trains the gate and alpha, and nothing else, on the experts' cached outputs by [`GateObjective`]. `track` watches
    the epochs, see [`ServerStep`].

    Returns:
        `dict[str, float]`: The mean `gate_loss` of the last epoch, and `gate_grad_norm`, the mean gradient norm;
        nothing of 0 epochs.
    """
    # Masks of dropout must not be alike in processes that have other rows.
    torch.manual_seed(seed + fit.index)
    generator = torch.Generator().manual_seed(seed)
    config = fit.model.config
    objective = GateObjective(config.num_main_experts, config.mix, entropy_weight, balance_weight)
    fit.begin(learning_rate, weight_decay)
    never_one = has_batch_statistics(fit.model.gate)
    total = norm = torch.zeros((), device=reserved.labels_R.device)
    steps = 0
    for _ in track(range(epochs), "Training the gate"):
        total, steps = torch.zeros_like(total), 0
        # In one copy, as a GPU is waited for by each.
        order_R = torch.randperm(len(reserved), generator=generator).to(reserved.labels_R.device)
        for indices in split_rows(order_R, batch_size, never_one):
            loss, grad_norm = fit.learn(reserved, cached, indices, objective)
            norm, total = norm + grad_norm, total + loss
            steps += 1
    fit.end()
    if steps == 0:
        return {}
    return {"gate_loss": (total / steps).item(), "gate_grad_norm": (norm / (steps * epochs)).item()}
