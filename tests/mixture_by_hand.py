"""The mixture of one example, written out expert by expert."""

import torch
from torch import Tensor

from hf_fedmoe.models import FedMoEPreTrainedModel


def mixture_by_hand(model: FedMoEPreTrainedModel, one: dict[str, Tensor], top_l: int) -> tuple[Tensor, list[int]]:
    """
    Probabilities `[C]` of a batch of one example with one main expert (Eq. 10), and the routed experts that were
    chosen, the preferred one first.
    """
    probs_K = model.gate_logits(model.gate_features(one), one).softmax(-1)[0]
    chosen_L = probs_K.argsort(descending=True)[:top_l]
    weights_L = probs_K[chosen_L].softmax(-1)
    experts = [model.routed_experts[k](**one).logits[0].softmax(-1) for k in chosen_L]
    main = model.main_experts[0](**one).logits[0].softmax(-1)
    mixed = (1 - model.alpha) * main + model.alpha * (weights_L[:, None] * torch.stack(experts)).sum(0)
    return mixed, chosen_L.tolist()
