"""
Takes the answer of a mixture apart: each expert's own, whom the gate chose, and what changes without some of them.

Shape suffixes: C classes, K routed experts, L of them chosen, S = main + routed experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models import FedMoEPreTrainedModel, dense_mixture, select_experts


@dataclass(frozen=True)
class Explanation:
    """
    An answer and its parts, for one example. Tensors are on the CPU.

    Args:
        probabilities_C (`torch.Tensor` of shape `(C,)`): The answer of the experts that are switched on.
        gate_K (`torch.Tensor` of shape `(K,)`): The gate's probabilities over the routed experts that are switched
            on, 0 for the others.
        weights_S (`torch.Tensor` of shape `(S,)`): Weight of each expert in the answer, main ones first; sums to 1.
        experts_SC (`torch.Tensor` of shape `(S, C)`): What each expert would have said alone, switched on or off.
    """

    probabilities_C: Tensor
    gate_K: Tensor
    weights_S: Tensor
    experts_SC: Tensor


@torch.no_grad()
def explain(model: FedMoEPreTrainedModel, inputs: Mapping[str, Tensor], on: Sequence[bool]) -> Explanation:
    """
    Takes the answer of a mixture to one example apart. With all experts switched on it is the model's own, bit for
    bit. The gate is renormalised over routed experts that are on, the main experts' weight goes to those left of them,
    and where no main expert is on, or no routed one, the others answer alone.

    Args:
        model ([`~models.FedMoEPreTrainedModel`]): A mixture, in evaluation mode.
        inputs (`Mapping[str, torch.Tensor]`): The model's inputs, a batch of one example.
        on (`Sequence[bool]`): Whether each of the S experts is switched on, main ones first.

    Raises:
        ValueError: When no expert is on, or `on` does not have an entry for each.
    """
    config = model.config
    n_main, size = config.num_main_experts, config.num_main_experts + config.num_routed_experts
    if len(on) != size:
        raise ValueError(f"`on` has {len(on)} entries: give one for each of the {size} experts.")
    if not any(on):
        raise ValueError("All experts are switched off, and nobody is left to answer: switch one on.")
    mains = [index for index in range(n_main) if on[index]]
    on_K = torch.tensor(on[n_main:], dtype=torch.float32)
    gate_1K, logits_1SC = _ask(model, inputs, on_K)
    top_l = min(config.top_l, int(on_K.sum()))
    weights_1L, chosen_1L = select_experts(gate_1K, top_l, config.top_l_weighting)
    alpha = model.alpha if top_l else 0.0
    mixed_1SC = logits_1SC[:, [*mains, *(n_main + k for k in chosen_1L[0].tolist())]]
    logits_1C = dense_mixture(mixed_1SC, weights_1L, alpha, len(mains), config.mix)

    weights_S = torch.zeros(size)
    routed = float(alpha) if mains else 1.0
    weights_S[mains] = (1 - routed) / max(len(mains), 1)
    weights_S[n_main + chosen_1L[0].cpu()] = routed * weights_1L[0].float().cpu()
    return Explanation(
        logits_1C[0].softmax(-1).cpu(),
        gate_1K[0].cpu() * on_K,
        weights_S,
        logits_1SC[0].softmax(-1).cpu(),
    )


def _ask(model: FedMoEPreTrainedModel, inputs: Mapping[str, Tensor], on_K: Tensor) -> tuple[Tensor, Tensor]:
    """The gate's probabilities and all experts' logits; a prior of ones and zeros renormalises over those on."""
    prior_K = on_K if on_K.any() else None
    given = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    output = model(**given, output_expert_logits=True, client_prior=prior_K)
    return output.gate_probs, output.expert_logits
