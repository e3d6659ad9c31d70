"""
A continuation by a mixture of owners of text, and whose expert wrote each token of it.

Shape suffixes: T tokens, E experts (the base first).
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models import FedMoEForCausalLM


@dataclass(frozen=True)
class Continuation:
    """
    A prompt and what follows.

    Args:
        tokens (`list[str]`): The T tokens, those of the prompt first.
        prompt_length (`int`): How many of them are the prompt's.
        weights_TE (`torch.Tensor` of shape `(T, E)`): Weight of each expert where the token was predicted, 0 for
            experts that are switched off; the first token is not predicted, and has zeros.
    """

    tokens: list[str]
    prompt_length: int
    weights_TE: Tensor

    @property
    def shares_E(self) -> Tensor:
        """Mean weights over the tokens of the continuation, zeros if there are none."""
        written_TE = self.weights_TE[self.prompt_length :]
        return written_TE.sum(0) / max(len(written_TE), 1)


@torch.no_grad()
def continue_text(
    model: FedMoEForCausalLM, tokenizer: Any, prompt: str, owners: Collection[str], length: int, seed: int | None
) -> Continuation:
    """
    Continues a text by the base and some of its owners.

    Args:
        model ([`~models.FedMoEForCausalLM`]): A mixture, in evaluation mode.
        tokenizer (`Any`): Its tokenizer.
        prompt (`str`): The text.
        owners (`Collection[str]`): Names of the owners that are switched on: the mixture is
            [`~models.FedMoEForCausalLM.only`] of these.
        length (`int`): Tokens of the continuation, at most.
        seed (`int`, *optional*): Draws tokens by this seed. The most probable ones if left out.

    Raises:
        ValueError: When the prompt is empty, or too long for the model.
    """
    if not prompt.strip():
        raise ValueError("There is nothing to continue: give a prompt.")
    names = model.config.expert_names
    kept = [name for name in names if name in owners or name == names[0]]
    mixture = model if kept == names else model.only(kept[1:]).eval()
    encoded = tokenizer(prompt, return_tensors="pt").to(model.device)
    most = model.config.get_text_config().max_position_embeddings - length
    if encoded["input_ids"].shape[1] > most:
        raise ValueError(f"The prompt has {encoded['input_ids'].shape[1]} tokens, and {most} fit: shorten it.")
    ids_1T = _generate(mixture, encoded, length, seed)
    weights_TE = torch.zeros(ids_1T.shape[1], len(names))
    where = [names.index(name) for name in kept]
    weights_TE[1:, where] = mixture.route(ids_1T)[0, :-1].cpu()
    tokens = [tokenizer.decode([token]) for token in ids_1T[0].tolist()]
    return Continuation(tokens, encoded["input_ids"].shape[1], weights_TE)


def _generate(mixture: FedMoEForCausalLM, encoded: Any, length: int, seed: int | None) -> Tensor:
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    asked = inputs | {"max_new_tokens": length, "do_sample": seed is not None}
    if seed is None:
        return mixture.generate(**asked)
    devices = [mixture.device] if mixture.device.type == "cuda" else []
    with torch.random.fork_rng(devices):  # whoever else draws, draws as before
        torch.manual_seed(seed)
        return mixture.generate(**asked)
