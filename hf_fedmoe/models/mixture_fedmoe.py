"""
Plain functions that mix the outputs of experts, cached ones too. Flat: the file travels to the Hub as it is.

Shape suffixes: B batch, C classes, K routed experts, L of them chosen, S = main + routed experts.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class FedMoEOutput(ModelOutput):
    """
    Output of the mixture.

    Args:
        loss (`torch.Tensor` of shape `(1,)`, *optional*, returned when `labels` is given):
            Cross-entropy of the mixture; in training plus the gate's entropy and load-balancing terms.
        logits (`torch.Tensor` of shape `(B, C)`):
            Logarithm of the mixture, so that `softmax(logits)` is the mixture.
        gate_probs (`torch.Tensor` of shape `(B, K)`):
            The gate's probability of each routed expert.
        selected_experts (`torch.Tensor` of shape `(B, L)`, *optional*, returned when the mixture is not dense):
            The routed experts that each example was sent to, most probable first.
        expert_logits (`torch.Tensor` of shape `(B, S, C)`, *optional*, returned with `output_expert_logits=True`):
            Every expert's own logits, main experts first.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    gate_probs: Tensor | None = None
    selected_experts: Tensor | None = None
    expert_logits: Tensor | None = None


def at_least_float32(tensor: Tensor) -> Tensor:
    """`tensor`, half precision made float32; float64 stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _safe_log(probs: Tensor) -> Tensor:
    """Logarithm that stays finite, and keeps a finite gradient, where a probability has underflowed to 0."""
    return probs.clamp_min(torch.finfo(probs.dtype).tiny).log()


@torch.no_grad()
def client_prior(output: FedMoEOutput, labels_B: Tensor, steps: int = 10) -> Tensor:
    """
    Finds which routed experts suit a client, from a few labelled rows of its own: the `client_prior` with which a
    mixture then answers it. The weights of the experts' p(expert | input) p(label | input, expert) by expectation
    maximisation, as FedEM finds a client's; one row's worth of doubt is shared by all experts.

    Args:
        output ([`FedMoEOutput`]): The mixture's, of the client's rows, with `output_expert_logits=True`.
        labels_B (`torch.Tensor` of shape `(B,)`): Their classes.
        steps (`int`, *optional*, defaults to 10): Of expectation maximisation.

    Returns:
        `torch.Tensor` of shape `(K,)`: sums to 1.

    Raises:
        ValueError: If there are no logits of experts, or labels are not one class of each row.
    """
    if output.expert_logits is None or output.gate_probs is None:
        raise ValueError("`output` has no `expert_logits`: call the mixture with `output_expert_logits=True`.")
    size, K = output.gate_probs.shape
    P_BKC = output.expert_logits[:, -K:].softmax(-1)
    labels_B = torch.as_tensor(labels_B, device=P_BKC.device)
    if labels_B.shape != (size,) or labels_B.is_floating_point():
        raise ValueError(
            f"`labels_B` has the shape {tuple(labels_B.shape)} and the type {labels_B.dtype}: give one class, a whole "
            f"number, for each of the {size} rows."
        )
    if size and not 0 <= labels_B.min() <= labels_B.max() < P_BKC.shape[2]:
        raise ValueError(
            f"`labels_B` goes from {labels_B.min()} to {labels_B.max()}: classes are 0 to {P_BKC.shape[2] - 1}."
        )
    likely_BK = output.gate_probs * P_BKC[torch.arange(size), :, labels_B]
    prior_K = likely_BK.new_full((K,), 1 / K)
    for _ in range(steps):
        share_BK = prior_K * likely_BK
        share_BK /= share_BK.sum(1, keepdim=True).clamp_min(torch.finfo(share_BK.dtype).tiny)
        prior_K = (share_BK.sum(0) + 1 / K) / (size + 1)
    return prior_K / prior_K.sum()


def log_prior(client_prior: Tensor, gate_logits_BK: Tensor) -> Tensor:
    """
    Returns the logarithm of a prior over routed experts, to be added to the gate's logits.

    Args:
        client_prior (`torch.Tensor` of shape `(K,)` or `(B, K)`): None below 0, one above it in each row.
        gate_logits_BK (`torch.Tensor` of shape `(B, K)`): The gate's logits.

    Raises:
        ValueError: If it is no such tensor.
    """
    size, K = gate_logits_BK.shape
    prior = torch.as_tensor(client_prior).to(gate_logits_BK)
    if prior.shape not in ((K,), (size, K)):
        raise ValueError(
            f"`client_prior` has the shape {tuple(prior.shape)}: give a weight for each of the {K} routed experts, "
            f"({K},), or ({size}, {K}) for each row."
        )
    if not ((prior >= 0).all() and prior.isfinite().all() and (prior.sum(-1) > 0).all()):
        raise ValueError(f"`client_prior` is {prior.tolist()}: give finite weights of 0 or more that are not all 0.")
    return prior.log()


def dense_mixture(
    logits_BSC: Tensor,
    gate_probs_BK: Tensor,
    alpha: Tensor | float,
    num_main_experts: int,
    mix: str = "probabilities",
) -> Tensor:
    """
    Mixes the outputs of all experts (Eq. 1): `P_bar = (1 - alpha) P_0 + alpha sum_k Q_k P_k`.

    Also serves the sparse mixture (Eq. 10), with the chosen experts' outputs and weights in place of all of them.

    Args:
        logits_BSC (`torch.Tensor` of shape `(B, S, C)`):
            The experts' logits, main experts first; P_0 is the mean of the main experts.
        gate_probs_BK (`torch.Tensor` of shape `(B, K)`):
            Weights of the routed experts.
        alpha (`torch.Tensor` or `float`):
            Weight of the routed part; not used without a main expert.
        num_main_experts (`int`):
            How many of the S experts are main experts. With 0 the result is the routed part alone.
        mix (`str`, *optional*, defaults to `"probabilities"`):
            `"probabilities"` as in the paper, or `"logits"`.

    Returns:
        `torch.Tensor` of shape `(B, C)`: log P_bar, in float32 at least.
    """
    logits_BSC, weights_BS = at_least_float32(logits_BSC), at_least_float32(gate_probs_BK)
    if num_main_experts > 0:
        main_weight = torch.as_tensor((1 - alpha) / num_main_experts, dtype=weights_BS.dtype, device=weights_BS.device)
        main_weights_BS = main_weight.reshape(1, 1).expand(weights_BS.shape[0], num_main_experts)
        weights_BS = torch.cat([main_weights_BS, alpha * weights_BS], dim=1)
    # Products and sums, not a matrix product: autocast would take that down to half precision.
    if mix == "logits":
        return (weights_BS[:, :, None] * logits_BSC).sum(dim=1).log_softmax(dim=-1)
    log_probs_BSC = logits_BSC.log_softmax(dim=-1)
    highest_B1C = log_probs_BSC.detach().amax(dim=1, keepdim=True)
    scaled_BC = (weights_BS[:, :, None] * (log_probs_BSC - highest_B1C).exp()).sum(dim=1)
    return _safe_log(scaled_BC) + highest_B1C.squeeze(1)


def select_experts(gate_probs_BK: Tensor, top_l: int, weighting: str = "softmax") -> tuple[Tensor, Tensor]:
    """
    Chooses the L routed experts with the largest gate probability (Eq. 10).

    Args:
        gate_probs_BK (`torch.Tensor` of shape `(B, K)`):
            Gate probabilities Q.
        top_l (`int`):
            Number L of experts to choose.
        weighting (`str`, *optional*, defaults to `"softmax"`):
            `"softmax"` of the chosen values of Q (the paper's letter, almost flat for L > 1) or `"renormalize"`,
            Q over the sum of the chosen values (L = K gives the dense mixture).

    Returns:
        Weights and indices of the chosen experts, `torch.Tensor` of shape `(B, L)` each, most probable first.
    """
    chosen_BL, experts_BL = gate_probs_BK.topk(top_l, dim=-1)
    if weighting == "softmax":
        return chosen_BL.softmax(dim=-1), experts_BL
    return chosen_BL / chosen_BL.sum(dim=-1, keepdim=True), experts_BL


def gating_entropy(gate_probs_BK: Tensor) -> Tensor:
    """Mean over the batch of the entropy (in nats) of the gate probabilities of shape `(B, K)` (Eq. 9). A scalar."""
    return -(gate_probs_BK * _safe_log(gate_probs_BK)).sum(dim=-1).mean()


def load_imbalance(gate_probs_BK: Tensor) -> Tensor:
    """KL(mean gate || uniform) in nats of gate probabilities of shape `(B, K)`; 0 if all experts are used alike."""
    mean_K = gate_probs_BK.mean(dim=0)
    return (mean_K * (_safe_log(mean_K) + math.log(mean_K.numel()))).sum()
