"""
Fed-MoE's Table 1, parameters and communication per round, counted: `python recipes/paper/table1.py`.

Models are built from the real configurations without memory for their weights, so that it takes seconds.
"""

from dataclasses import dataclass

import torch
from transformers import BertConfig, GPT2Config, PreTrainedConfig

from hf_fedmoe.models import (
    FedMoEConfig,
    FedMoEForImageClassification,
    FedMoEForSequenceClassification,
    FedMoEPreTrainedModel,
    SmallCNNConfig,
    SmallImageResNetConfig,
)


@dataclass
class Setting:
    """One data set of the paper: its models, K routed experts, m clients in a round, and what Table 1 says of them."""

    name: str
    mixture_class: type[FedMoEPreTrainedModel]
    expert: PreTrainedConfig
    gate: PreTrainedConfig
    num_routed_experts: int
    clients_per_round: int
    published: dict[str, str]


def gpt2(num_labels: int, **shape: int) -> GPT2Config:
    """GPT-2 as a classifier; a pad token, which adds no weights."""
    return GPT2Config(num_labels=num_labels, pad_token_id=50256, **shape)


SETTINGS = [
    Setting(
        "FEMNIST",
        FedMoEForImageClassification,
        SmallCNNConfig(num_labels=62),
        SmallCNNConfig(num_labels=5),
        5,
        5,
        {"FedAvg": "6.5 M, 33 M", "FedMix": "26 M, 130 M", "Fed-MoE": "52 M, 33 M"},
    ),
    Setting(
        "CIFAR-10",
        FedMoEForImageClassification,
        SmallImageResNetConfig(num_labels=10),
        SmallImageResNetConfig(num_labels=5),
        5,
        5,
        {},
    ),
    Setting(
        "SENT-140",
        FedMoEForSequenceClassification,
        BertConfig(num_labels=2),
        BertConfig(num_labels=3),
        3,
        3,
        {},
    ),
    Setting(
        "Yelp",
        FedMoEForSequenceClassification,
        gpt2(num_labels=5, n_embd=1024, n_layer=24, n_head=16),
        gpt2(num_labels=3),
        3,
        3,
        {"FedAvg": "0.36 B, 1.02 B", "FedMix": "0.93 B, 2.79 B", "Fed-MoE": "1.59 B, 1.02 B"},
    ),
]


def parameters(setting: Setting, num_main_experts: int, num_routed_experts: int) -> int:
    """Parameters of a mixture with a gate of its own, alpha included where there is a main expert to weigh."""
    config = FedMoEConfig(
        expert_config=setting.expert,
        gate="model",
        gate_config=setting.gate,
        num_main_experts=num_main_experts,
        num_routed_experts=num_routed_experts,
    )
    with torch.device("meta"):
        model = setting.mixture_class(config)
    return sum(p.numel() for name, p in model.named_parameters() if num_main_experts or name != "alpha_logit")


def counts(setting: Setting) -> dict[str, tuple[int, int]]:
    """Counts by method what its server model has and what m clients send in a round."""
    with torch.device("meta"):
        expert = setting.mixture_class.expert_auto_class.from_config(setting.expert).num_parameters()
    fedmix = parameters(setting, 0, setting.num_routed_experts)
    fedmoe = parameters(setting, 1, setting.num_routed_experts)
    m = setting.clients_per_round
    return {"FedAvg": (expert, m * expert), "FedMix": (fedmix, m * fedmix), "Fed-MoE": (fedmoe, m * expert)}


def main() -> None:
    """Prints the table."""
    print("| | K | m | method | parameters | sent by m clients in a round | published: parameters, communication |")
    print("|---|---|---|---|---|---|---|")
    for setting in SETTINGS:
        for method, (size, sent) in counts(setting).items():
            sizes = f"{setting.num_routed_experts} | {setting.clients_per_round} | {method} | {size:,} | {sent:,}"
            print(f"| {setting.name} | {sizes} | {setting.published.get(method, '')} |")


if __name__ == "__main__":
    main()
