"""Metrics of the experts of a mixture, alone and together, and of what the gate makes of them.

Shape suffixes: N test examples, S experts (main ones first), K routed experts, C classes.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from sklearn.metrics import f1_score
from torch import Tensor
from torch.utils.data import DataLoader

from ..models import FedMoEPreTrainedModel, dense_mixture, select_experts
from ..weights import StateLayout
from .auc import macro_auc


def scores(probabilities_NC: Tensor, labels_N: Tensor) -> dict[str, float]:
    """
    `accuracy` and `macro_f1` of the most probable classes, and `auc`, the mean area under the ROC curve of each class
    among the examples against the rest.
    """
    found_NC, true_N = probabilities_NC.cpu().numpy(), labels_N.cpu().numpy()
    predicted_N = found_NC.argmax(-1)
    classes = list(range(found_NC.shape[-1]))
    return {
        "accuracy": float((predicted_N == true_N).mean()),
        "macro_f1": float(f1_score(true_N, predicted_N, labels=classes, average="macro", zero_division=0)),
        "auc": macro_auc(found_NC, true_N),
    }


@dataclass
class ExpertAnalysis:
    """
    Args:
        scores (`dict[str, dict[str, float]]`):
            Accuracy, macro-F1 and AUC of: `main_expert` (when there is one), `expert_k`, `best_expert` (the best
            single one *on these examples*, main or routed), `uniform_ensemble` (mean of all experts' probabilities),
            `weight_average` (the mean of all experts' weights as one model), `top_l` for L = 1 to K, `dense`, and
            `oracle_expert` (right whenever any expert is: no gate can do better by choosing one; it has no AUC).
        share_KC (`np.ndarray` of shape `[K, C]`): Mean gate probability of expert k on examples of class c, NaN for a
            class without examples.
        disagreement_SS (`np.ndarray` of shape `[S, S]`): Share of examples on which two experts differ.
    """

    scores: dict[str, dict[str, float]]
    share_KC: np.ndarray
    disagreement_SS: np.ndarray


@torch.no_grad()
def analyse_experts(
    model: FedMoEPreTrainedModel, dataset: datasets.Dataset, collate: Callable, batch_size: int = 64
) -> ExpertAnalysis:
    """
    Runs every expert over a labelled data set and compares what they make of it.

    Args:
        model ([`~models.FedMoEPreTrainedModel`]): A mixture.
        dataset (`datasets.Dataset`): Tokenised examples with labels, only columns that the model takes.
        collate (`Callable`): A data collator.
        batch_size (`int`, *optional*, defaults to 64): Examples per forward pass.
    """
    model.eval()
    config, device = model.config, next(model.parameters()).device
    batches = _on_device(DataLoader(dataset, batch_size, collate_fn=collate), device)
    logits, gates, averages, labels = [], [], [], []
    average = _weight_average(model)
    for batch in batches:
        labels.append(batch.pop("labels"))
        logits_BSC, features_BH = model.expert_outputs(batch)
        logits.append(logits_BSC.float())
        gates.append(model.gate_logits(features_BH, batch).float().softmax(-1))
        averages.append(average(**batch).logits.float())
    logits_NSC, Q_NK, labels_N = torch.cat(logits), torch.cat(gates), torch.cat(labels)
    probabilities_NSC = logits_NSC.softmax(-1)
    num_main, K = config.num_main_experts, config.num_routed_experts
    found = {"main_expert": scores(probabilities_NSC[:, 0], labels_N)} if num_main else {}
    found |= {f"expert_{k}": scores(probabilities_NSC[:, num_main + k], labels_N) for k in range(K)}
    found["best_expert"] = max(found.values(), key=lambda score: score["accuracy"])
    found["uniform_ensemble"] = scores(probabilities_NSC.mean(1), labels_N)
    found["weight_average"] = scores(torch.cat(averages).softmax(-1), labels_N)
    routed_NKC, main = logits_NSC[:, num_main:], logits_NSC[:, :num_main]
    for top_l in range(1, K + 1):
        weights_NL, experts_NL = select_experts(Q_NK, top_l, config.top_l_weighting)
        chosen_NLC = routed_NKC.gather(1, experts_NL[..., None].expand(-1, -1, routed_NKC.shape[-1]))
        mixed_NC = dense_mixture(torch.cat([main, chosen_NLC], 1), weights_NL, model.alpha, num_main, config.mix)
        found[f"top_{top_l}"] = scores(mixed_NC.softmax(-1), labels_N)
    dense_NC = dense_mixture(logits_NSC, Q_NK, model.alpha, num_main, config.mix)
    found["dense"] = scores(dense_NC.softmax(-1), labels_N)
    predicted_NS = logits_NSC.argmax(-1)
    right_NC = torch.zeros_like(logits_NSC[:, 0]).scatter_(1, predicted_NS[:, :1], 0.5)
    any_right_N = (predicted_NS == labels_N[:, None]).any(1)
    right_NC[any_right_N] = torch.nn.functional.one_hot(labels_N, logits_NSC.shape[-1]).float()[any_right_N]
    found["oracle_expert"] = scores(right_NC, labels_N)
    del found["oracle_expert"]["auc"]  # it says which class, not how probable the others are
    share_KC = torch.stack([Q_NK[labels_N == c].mean(0) for c in range(logits_NSC.shape[-1])], dim=1)
    disagreement_SS = (predicted_NS[:, :, None] != predicted_NS[:, None, :]).float().mean(0)
    return ExpertAnalysis(found, share_KC.cpu().numpy(), disagreement_SS.cpu().numpy())


def _on_device(batches: Iterable[dict[str, Tensor]], device: torch.device) -> Iterable[dict[str, Tensor]]:
    for batch in batches:
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def _weight_average(model: FedMoEPreTrainedModel) -> torch.nn.Module:
    """One expert whose weights are the plain mean of all experts' weights."""
    # Not of the first: a main expert that is frozen has nothing in its layout.
    average = copy.deepcopy(model.experts[-1])
    layout = StateLayout.of(average)
    layout.write(torch.stack([layout.read(expert) for expert in model.experts]).mean(0), average)
    return average
