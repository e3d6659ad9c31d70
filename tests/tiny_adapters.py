"""Small mixtures of adapters of every kind of base, their experts made different."""

from pathlib import Path

import torch
from peft import IA3Config, LoraConfig
from torch import nn
from transformers import (
    PreTrainedModel,
)

import hf_fedmoe
from hf_fedmoe.models import FedMoEForImageClassification, FedMoEForSequenceClassification
from tests.tiny_images import image_batch, tiny_vit
from tests.tiny_models import (
    PAD_TOKEN_ID,
    make_different,
    text_batch,
    tiny_bert,
    tiny_gpt2,
    tiny_roberta,
)


BASES = {
    "bert": tiny_bert,
    "gpt2": lambda num_labels=4: tiny_gpt2(num_labels, pad_token_id=PAD_TOKEN_ID),
    "roberta": tiny_roberta,
    "vit": tiny_vit,
}
# PEFT has no default for ViT.
VIT_CONFIGS = {
    "lora": {"target_modules": ["q_proj", "v_proj"]},
    "ia3": {"target_modules": ["k_proj", "v_proj", "fc2"], "feedforward_modules": ["fc2"]},
}
KINDS = tuple(VIT_CONFIGS)
# Each family, kind and gate, and what differs from the others: Conv1D (GPT-2), a head of several layers (RoBERTa),
# names of tensors that transformers translates (ViT).
CASES = [
    ("bert", "lora", "main_features"),
    ("bert", "ia3", "adapter"),
    ("gpt2", "lora", "adapter"),
    ("gpt2", "ia3", "main_features"),
    ("roberta", "lora", "main_features"),
    ("roberta", "ia3", "adapter"),
    ("vit", "lora", "adapter"),
    ("vit", "ia3", "main_features"),
]
LABELS = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
REVIEWS = Path(hf_fedmoe.__file__).parent / "assets" / "gpt2-reviews"


def adapter_config(kind: str = "lora", family: str = "bert", **changes) -> LoraConfig | IA3Config:
    fields = VIT_CONFIGS[kind] if family == "vit" else {}
    return IA3Config(**fields, **changes) if kind == "ia3" else LoraConfig(**{"r": 4, **fields, **changes})


def mixture_class(family: str) -> type[PreTrainedModel]:
    return FedMoEForImageClassification if family == "vit" else FedMoEForSequenceClassification


def examples(family: str = "bert", size: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    return image_batch(size, seed=seed) if family == "vit" else text_batch(size, seed=seed)


@torch.no_grad()
def make_experts_different(model: PreTrainedModel, family: str) -> PreTrainedModel:
    """Noise in every adapter and head, and a gate that sends the examples to several experts."""
    for seed, expert in enumerate(model.experts):
        make_different(expert, 0.3, seed)
    if model.config.gate != "model":
        for parameter in model.gate_parameters():  # with `gate="adapter"` an adapter, which starts with zeros
            parameter += 0.1
        make_different(model.gate, 3.0)
        if model.gate.bias is not None:
            model.gate.bias -= model(**examples(family), dense=True).gate_probs.log().mean(0)
    return model


def build(
    family: str = "bert",
    kind: str = "lora",
    base: PreTrainedModel | str | Path | None = None,
    different: bool = True,
    **config,
) -> PreTrainedModel:
    torch.manual_seed(0)
    config = {"num_routed_experts": 3, "peft_config": adapter_config(kind, family)} | config
    base = BASES[family]() if base is None else base
    model = mixture_class(family).from_expert(base, **config)
    return make_experts_different(model, family) if different else model


def saved_base(family: str, path: Path) -> Path:
    torch.manual_seed(3)
    BASES[family]().save_pretrained(path / "base")
    return path / "base"


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def names_of_base(model: PreTrainedModel) -> set[str]:
    """All tensors in the base's wrapper that belong to none of the adapters."""
    return {
        name
        for name in model.state_dict()
        if name.startswith("base.") and not set(name.split(".")) & set(model.adapter_names)
    }
