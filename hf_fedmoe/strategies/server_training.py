"""Training on the server: models on the reserved set, and what they say of it.

Shape suffixes: R reserved examples, S experts (main ones first), C classes, H features, m clients, K routed experts.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from torch.optim.lr_scheduler import LinearLR

from ..data import ReservedSet, has_batch_statistics, split_rows
from ..federation import CapturedPasses, Loss, Pass, ServerStep, Track, untracked
from ..models import FedMoEPreTrainedModel
from ..weights import StateLayout
from .narrowing import as_mixture, reserved_of


# An expert, the settings of [`fine_tune`] and the weights of the examples.
_Tuning = tuple[int, tuple[int, float, float, int, int], Tensor | None]


def adamw(parameters: list[nn.Parameter] | list[dict[str, Any]], **settings: Any) -> AdamW:
    """Makes the server's optimizer, whose step is one kernel on a GPU."""
    first = parameters[0]["params"][0] if isinstance(parameters[0], dict) else parameters[0]
    return AdamW(parameters, fused=True if first.is_cuda else None, **settings)


def fine_tune(
    model: nn.Module,
    reserved: ReservedSet,
    epochs: int,
    learning_rate: float,
    weight_decay: float,
    batch_size: int,
    seed: int,
    weights_R: Tensor | None = None,
    track: Track = untracked,
    what: str = "Fine-tuning on the reserved set",
    captured: dict[nn.Module, CapturedPasses] | None = None,
) -> float:
    """
    Trains a classifier on the reserved set by AdamW, its learning rate falling to 0, and returns its mean loss.

    `weights_R`, if given, weighs the examples: routed experts learn from those that the gate sends them. All
    randomness (order, dropout) follows from `seed`. `track` ([`Server.track`]) watches the epochs, which do `what`.
    `captured` ([`ServerStep`]) has passes of this and other models.

    Raises:
        ValueError: When there are weights, and the loss is one of the user's own, which has none of single examples.
    """
    if weights_R is not None and reserved.objective is not None:
        raise ValueError("A loss of one's own is that of a batch: its examples cannot be weighed one by one.")
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = adamw(list(model.parameters()), lr=learning_rate, weight_decay=weight_decay)
    never_one = has_batch_statistics(model)
    num_steps = epochs * len(split_rows(torch.arange(len(reserved)), batch_size, never_one))
    # At a constant rate what comes out depends on the last few batches: up to five points of accuracy on the reviews.
    scheduler = LinearLR(optimizer, 1.0, 0.0, total_iters=num_steps)
    loss = _cross_entropy if reserved.objective is None else reserved.objective
    take = _passes(model, reserved)
    if captured is not None:
        if model not in captured:
            captured[model] = CapturedPasses(model, take, nullcontext, {}, _cross_entropy)
        take = captured[model]
    model.train()
    total = torch.zeros((), device=reserved.labels_R.device)
    for _ in track(range(epochs), what):
        for indices in split_rows(torch.randperm(len(reserved), generator=generator), batch_size, never_one):
            batch = reserved.training_batch(indices)
            if weights_R is not None:
                batch["weights"] = weights_R[indices]
            total += take(loss, batch, 1.0, 1)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
    model.eval()
    return (total / num_steps).item()


def _passes(model: nn.Module, reserved: ReservedSet) -> Pass:
    """Returns what takes a forward and a backward pass of a batch."""

    def take(loss: Loss, batch: dict[str, Tensor], weight: float, count: int) -> Tensor:
        with reserved.autocast():
            value = loss(model, batch)
        (value * weight / count).backward()
        return value.detach() * weight / count

    return take


def _cross_entropy(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Returns the mean cross-entropy of a batch, its examples weighed by its `weights` if there are any."""
    inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "weights")}
    losses_B = cross_entropy(model(**inputs).logits.float(), batch["labels"], reduction="none")
    return (losses_B * batch["weights"] if "weights" in batch else losses_B).mean()


def fine_tune_experts(
    step: ServerStep,
    weights: Sequence[Tensor | None],
    epochs: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
) -> list[float]:
    """[`fine_tune`] of each expert by itself, with its own weights `[R]` of the examples; returns their losses."""
    server = step.server
    settings = (epochs, learning_rate, server.weight_decay, batch_size, seed)
    items = [(s, settings, None if weights_R is None else weights_R.cpu()) for s, weights_R in enumerate(weights)]
    tuned = step.share(_fine_tune_expert, items)
    for row_P, expert, found in zip(server.bank_SP, as_mixture(server.model).experts, tuned, strict=True):
        row_P.copy_(found["row_P"])  # the same memory if it was trained here
        server.layout.write_integers(found, expert)
    return [found["loss"].item() for found in tuned]


def _fine_tune_expert(step: ServerStep, item: _Tuning) -> dict[str, Tensor]:
    s, settings, weights_R = item
    server, reserved = step.server, reserved_of(step)
    expert = as_mixture(server.model).experts[s]
    if weights_R is not None:
        weights_R = weights_R.to(reserved.labels_R.device)
    what = f"Fine-tuning expert {s + 1}/{len(server.bank_SP)}"
    loss = fine_tune(expert, reserved, *settings, weights_R, step.track, what, step.captured)
    return {**server.layout.read_integers(expert), "row_P": server.bank_SP[s], "loss": torch.tensor(loss)}


@torch.no_grad()
def probe(worker: nn.Module, layout: StateLayout, row_P: Tensor, reserved: ReservedSet) -> Tensor:
    """P_y `[R]`: a client's probability of the true class of each reserved example (Fed-MoE, below Eq. 4)."""
    worker.eval()
    layout.write(row_P, worker)
    with reserved.autocast():
        logits_RC = torch.cat([worker(**inputs).logits.float() for inputs in reserved.inputs])
    return logits_RC.softmax(-1).gather(1, reserved.labels_R[:, None]).squeeze(1)


@dataclass
class ExpertOutputs:
    """The frozen experts' outputs on the reserved set: all that the gate's training needs of them."""

    logits_RSC: Tensor
    features_RH: Tensor | None


def expert_outputs(step: ServerStep) -> ExpertOutputs:
    """One dense pass of every expert over the reserved set, batch by batch."""
    outputs = step.share(_outputs_of_batch, range(len(reserved_of(step).inputs)))
    features = [found["features_BH"] for found in outputs if "features_BH" in found]
    return ExpertOutputs(
        torch.cat([found["logits_BSC"] for found in outputs]), torch.cat(features) if features else None
    )


@torch.no_grad()
def _outputs_of_batch(step: ServerStep, index: int) -> dict[str, Tensor]:
    model, reserved = as_mixture(step.server.model), reserved_of(step)
    model.eval()
    with reserved.autocast():
        logits_BSC, features_BH = model.expert_outputs(reserved.inputs[index])
    found = {"logits_BSC": logits_BSC.float()}
    if features_BH is None:
        return found
    # The gate reads them without autocast.
    return found | {"features_BH": features_BH.to(next(model.gate.parameters()).dtype)}


@torch.no_grad()
def gate_probabilities(model: FedMoEPreTrainedModel, cached: ExpertOutputs, reserved: ReservedSet) -> Tensor:
    """Q `[R, K]`, the softmax of the gate (Fed-MoE Eq. 2)."""
    model.eval()
    if cached.features_RH is not None:
        return model.gate_logits(cached.features_RH, {}).float().softmax(-1)
    with reserved.autocast():
        return torch.cat([model.gate_logits(None, inputs).float().softmax(-1) for inputs in reserved.inputs])
