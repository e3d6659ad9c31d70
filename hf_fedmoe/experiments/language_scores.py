"""Bits per byte of experts, of mixtures of them, and of what they are compared with.

Shape suffixes: N sequences, T tokens, S = T - 1 predicted ones, K owners, E = K + 1 experts (the base first).
"""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models import FedMoEForCausalLM


# From token ids, `(N, T)`, to the logarithm of the probability of each after the first, `(N, S)`.
Way = Callable[[Tensor], Tensor]
BASE, SOFT, TOP_1 = "base", "mixture, soft", "mixture, top-1"
BATCH = 16


@torch.no_grad()
def log_likelihoods(model: PreTrainedModel, ids_NT: Tensor, **how: Any) -> Tensor:
    """
    Computes the logarithm of the probability of each token after the first one.

    Args:
        model (`PreTrainedModel`): The mixture, or another causal language model.
        ids_NT (`torch.Tensor` of shape `(N, T)`): Token ids.
        how: For the model: `expert` for one expert, `expert_weights`, or nothing for the router.

    Returns:
        `torch.Tensor` of shape `(N, S)`, in float32.
    """
    found = []
    for ids_BT in ids_NT.split(BATCH):
        ids_BT = ids_BT.to(model.device)
        logits = model(input_ids=ids_BT, use_cache=False, **how).logits[:, :-1].float()
        next_BS = ids_BT[:, 1:]
        # As rows: a GPU with deterministic algorithms has no other cross-entropy.
        told_N = -torch.nn.functional.cross_entropy(logits.flatten(0, 1), next_BS.flatten(), reduction="none")
        found.append(told_N.view(next_BS.shape).cpu())
    return torch.cat(found)


def weighted_by_likelihood(model: FedMoEForCausalLM, ids_NT: Tensor) -> Tensor:
    """Computes [`log_likelihoods`] of the mixture whose weights are the posterior over experts, by the text so far."""
    batches = (ids_BT.to(model.device) for ids_BT in ids_NT.split(BATCH))
    return torch.cat([log_likelihoods(model, b, expert_weights=model.route_by_likelihood(b)) for b in batches])


def bytes_of(tokenizer: PreTrainedTokenizerBase, ids_NT: Tensor) -> int:
    """Counts the bytes of the tokens after the first one of each sequence."""
    texts = tokenizer.batch_decode(ids_NT[:, 1:], skip_special_tokens=True)
    return sum(len(text.encode()) for text in texts)


def bits_per_byte(found_NS: Tensor, count: int) -> float:
    """
    Computes how many bits a byte costs.

    Args:
        found_NS (`torch.Tensor` of shape `(N, S)`): From [`log_likelihoods`].
        count (`int`): From [`bytes_of`].
    """
    return -found_NS.double().sum().item() / math.log(2) / count


def uniform_ensemble(found_KNS: Tensor) -> Tensor:
    """Mixes the probabilities of all experts alike, `(N, S)`."""
    return found_KNS.logsumexp(dim=0) - math.log(len(found_KNS))


def likelihood_router(found_ENS: Tensor) -> Tensor:
    """Mixes the probabilities of all experts by how well each has told the sequence so far, `(N, S)`."""
    before_ENS = torch.nn.functional.pad(found_ENS.cumsum(dim=-1), (1, 0))[..., :-1]
    return (before_ENS + found_ENS).logsumexp(dim=0) - before_ENS.logsumexp(dim=0)


def remembered(way: Way) -> Way:
    """Returns a way that asks the model once for the same tensor."""
    known: dict[Tensor, Tensor] = {}

    def told(ids_NT: Tensor) -> Tensor:
        if ids_NT not in known:
            known[ids_NT] = way(ids_NT)
        return known[ids_NT]

    return told


def single_ways(model: FedMoEForCausalLM, owners: Iterable[str]) -> dict[str, Way]:
    """
    Gives the ways to ask a mixture for one forward of the base, of an owner's expert, and of all by its router.

    Args:
        model ([`FedMoEForCausalLM`]): The mixture.
        owners (`Iterable[str]`): Names of the owners, among its experts.
    """
    alone = {name: partial(log_likelihoods, model, expert=name) for name in (BASE, *owners)}
    return {**alone, SOFT: partial(log_likelihoods, model)}


def ways_of(model: FedMoEForCausalLM, single: Mapping[str, Way]) -> dict[str, Way]:
    """
    Gives the ways to use a mixture's experts, by the names that tables have.

    Args:
        model ([`FedMoEForCausalLM`]): The mixture.
        single (`Mapping[str, Way]`): From [`single_ways`], as they are or [`remembered`].
    """
    experts = [name for name in single if name != SOFT]
    owners = [name for name in experts if name != BASE]
    # The mean of the adapters' products is what all of them with equal weights add.
    soup_11E = torch.zeros(1, 1, len(model.config.expert_names), device=model.device)
    for name in owners:
        soup_11E[..., model.config.expert_index(name)] = 1 / len(owners)

    def together(names: Iterable[str], ids_NT: Tensor) -> Tensor:
        return torch.stack([single[name](ids_NT) for name in names])

    def top_1(ids_NT: Tensor) -> Tensor:
        top_l, model.config.top_l = model.config.top_l, 1
        try:
            return log_likelihoods(model, ids_NT)
        finally:
            model.config.top_l = top_l

    return {
        **single,
        "soup": partial(log_likelihoods, model, expert_weights=soup_11E),
        "uniform ensemble": lambda ids_NT: uniform_ensemble(together(owners, ids_NT)),
        TOP_1: top_1,
        "likelihood router": lambda ids_NT: likelihood_router(together(experts, ids_NT)),
        # A bit above the better one in all, at the cost of two forwards.
        "mixture or base by likelihood": lambda ids_NT: likelihood_router(together((BASE, SOFT), ids_NT)),
        "mixture, weights by likelihood": partial(weighted_by_likelihood, model),
    }
