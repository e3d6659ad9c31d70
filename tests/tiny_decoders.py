"""Causal language models, and mixtures of owners over them, small enough for tests."""

import zlib

import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hf_fedmoe.models import FedMoEForCausalLM, TextStatistics, text_statistics
from tests.tiny_models import EOS_TOKEN_ID, PAD_TOKEN_ID, VOCAB_SIZE, make_different


HIDDEN, RANK, ALPHA = 32, 4, 6
OWNERS = ("court", "press", "code")
TOKENS = {"vocab_size": VOCAB_SIZE, "pad_token_id": PAD_TOKEN_ID} | dict.fromkeys(
    ("bos_token_id", "eos_token_id"), EOS_TOKEN_ID
)
SIZES = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"intermediate_size": 48, "head_dim": 8, "max_position_embeddings": 64} | TOKENS


def _tiny_gpt2(**config) -> PreTrainedModel:
    sizes = {"n_layer": 2, "n_embd": HIDDEN, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes | {"attn_pdrop": 0.0} | TOKENS | config))


DECODERS = {
    "gpt2": _tiny_gpt2,
    "llama": lambda **config: LlamaForCausalLM(LlamaConfig(**SIZES | config)),
    "qwen2": lambda **config: Qwen2ForCausalLM(Qwen2Config(**SIZES | config)),
    "qwen3": lambda **config: Qwen3ForCausalLM(Qwen3Config(**SIZES | config)),
    # Attention with a window shorter than the texts; SmolLM2 is a Llama with tied embeddings.
    "gemma2": lambda **config: Gemma2ForCausalLM(Gemma2Config(**SIZES | {"sliding_window": 8} | config)),
    "gemma3": lambda **config: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES | {"sliding_window": 8} | config)),
    "smollm2": lambda **config: LlamaForCausalLM(LlamaConfig(**SIZES | {"tie_word_embeddings": True} | config)),
}


def tiny_decoder(family: str = "llama", seed: int = 0, **config) -> PreTrainedModel:
    torch.manual_seed(seed)
    return make_different(DECODERS[family](**config), 0.1, seed).eval()


def texts_of(name: str, count: int = 8, length: int = 40) -> list[Tensor]:
    """Token ids of which half are from a range of the owner's own."""
    seed = zlib.crc32(name.encode())
    generator = torch.Generator().manual_seed(seed)
    own = 2 + seed % 24
    low, high = torch.tensor([2, own]), torch.tensor([EOS_TOKEN_ID, own + 12])
    texts = []
    for _ in range(count):
        kind = torch.randint(0, 2, (length,), generator=generator)
        texts.append(low[kind] + torch.randint(0, 1000, (length,), generator=generator) % (high - low)[kind])
    return texts


def statistics_for(model: PreTrainedModel, name: str) -> TextStatistics:
    return text_statistics(model.get_input_embeddings(), texts_of(name))


def adapter_for(model: FedMoEForCausalLM, name: str) -> dict[str, Tensor]:
    """A random LoRA adapter under PEFT's names."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    tensors = {}
    for layer, module in model.expert_layers().items():
        inputs, outputs = module.owners.lora_A.shape[1], module.owners.lora_B.shape[1]
        for matrix, shape in (("A", (RANK, inputs)), ("B", (outputs, RANK))):
            value = 0.3 * torch.randn(shape, generator=generator)
            tensors[f"base_model.model.{layer}.lora_{matrix}.weight"] = value
    return tensors


def tiny_mixture(
    family: str = "llama", owners: tuple[str, ...] = OWNERS, base: PreTrainedModel | str | None = None, **config
) -> FedMoEForCausalLM:
    """Experts that differ, and a router that is of several minds."""
    base = tiny_decoder(family) if base is None else base
    config = {"lora_rank": RANK, "lora_alpha": ALPHA, "router_temperature": 0.4} | config
    model = FedMoEForCausalLM.from_base(base, **config)
    model.set_statistics("base", statistics_for(model, "base"))
    for name in owners:
        model = model.add_owner(adapter_for(model, name), statistics_for(model, name), name=name)
    return model


def prompts(pad: bool = True) -> dict[str, Tensor]:
    """Three rows of up to ten tokens, padded on the left."""
    generator = torch.Generator().manual_seed(5)
    input_ids = torch.randint(2, EOS_TOKEN_ID, (3, 10), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    if pad:
        attention_mask[1, :4], attention_mask[2, :1] = 0, 0
        input_ids = input_ids.masked_fill(attention_mask == 0, PAD_TOKEN_ID)
    return {"input_ids": input_ids, "attention_mask": attention_mask}
