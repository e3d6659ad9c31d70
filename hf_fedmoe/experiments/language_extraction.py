"""
Extraction of an owner's training text, after FlexOlmo's section 5.3 (arXiv 2507.07024): models read 32 tokens of it
and go on.

Shape suffixes: N sequences, T tokens.
"""

from typing import Any

import torch
from torch import Tensor

from ..models import FedMoEForCausalLM
from ..reporting.markdown import table


# Tokens that are read, and that are compared.
PREFIX, CONTINUATION = 32, 32


@torch.no_grad()
def reproduced(model: FedMoEForCausalLM, ids_NT: Tensor, prefix: int = PREFIX, **how: Any) -> tuple[float, float]:
    """
    Has a model go on greedily from the beginnings of sequences that were trained on.

    Args:
        model ([`FedMoEForCausalLM`]): The mixture.
        ids_NT (`torch.Tensor` of shape `(N, T)`): Token ids; what follows the prefix is compared.
        prefix (`int`, *optional*, defaults to 32): Tokens that are read.
        how: For the model: `expert` for one expert, or nothing for the router.

    Returns:
        `tuple[float, float]`: The share of sequences that come out to the last token, and how many tokens are right
        before the first wrong one, on average.
    """
    read_NT, true_NT = ids_NT[:, :prefix].to(model.device), ids_NT[:, prefix:].to(model.device)
    new = true_NT.shape[1]
    told = {
        "max_new_tokens": new,
        "min_new_tokens": new,
        "do_sample": False,
        "attention_mask": torch.ones_like(read_NT),
    }
    found_NT = model.eval().generate(read_NT, **told, **how)[:, prefix:]
    right_NT = (found_NT == true_NT).long().cumprod(dim=1)
    return right_NT[:, -1].double().mean().item(), right_NT.sum(dim=1).double().mean().item()


def extraction_table(model: FedMoEForCausalLM, trained: dict[str, list[list[int]]], count: int) -> str:
    """
    Compares what the base, an owner's expert, the mixture, and the mixture without the owner give back of its text.

    Args:
        model ([`FedMoEForCausalLM`]): The mixture.
        trained (`dict[str, list[list[int]]]`): Sequences that each owner trained on.
        count (`int`): How many of each are tried, taken from all of them.
    """
    rows: dict[str, list[str]] = {"base": [], "the owner's expert": [], "mixture": [], "mixture without the owner": []}
    for owner, sequences in trained.items():
        chosen = sequences[:: max(1, len(sequences) // count)][:count]
        ids_NT = torch.tensor(chosen)[:, : PREFIX + CONTINUATION]
        runs: tuple[tuple[FedMoEForCausalLM, dict[str, Any]], ...]
        runs = ((model, {"expert": "base"}), (model, {"expert": owner}), (model, {}), (model.without(owner), {}))
        for cells, (each, how) in zip(rows.values(), runs, strict=True):
            whole, right = reproduced(each, ids_NT, **how)
            cells.append(f"{whole:.0%}, {right:.1f}")
    return table([[name, *cells] for name, cells in rows.items()], ["", *trained])
