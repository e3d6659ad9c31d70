"""What makes a run the one that it is: checkpoints carry it, and processes of a launch compare it."""

import dataclasses
from typing import Any

from ..data import FederatedDataset
from ..strategies import Strategy
from ..weights import StateLayout
from .federated_arguments import FederatedTrainingArguments


def run_identity(
    args: FederatedTrainingArguments,
    strategy: Strategy,
    layout: StateLayout,
    num_models: int,
    base_fingerprint: int | None,
    data: FederatedDataset,
) -> dict[str, Any]:
    """What two runs must have in common for one to resume the other."""
    settings = strategy.settings if strategy.name == "fedmoe" else strategy
    return {
        "strategy": strategy.name,
        "strategy_settings": dataclasses.asdict(settings) if dataclasses.is_dataclass(settings) else {},
        "server_models": num_models,
        "parameters": layout.num_elements,
        "base": base_fingerprint,
        "data": data.state_fingerprint(),
        **{
            name: vars(args)[name]
            for name in (
                "seed",
                "client_draw_seed",
                "client_choice",
                "upload_compression",
                "top_k_share",
                "lora_fusion",
                "client_ranks",
                "clients_per_round",
                "num_train_epochs",
                "per_device_train_batch_size",
                "gradient_accumulation_steps",
                "learning_rate",
                "weight_decay",
                "lr_scheduler_scope",
                "keep_client_optimizer",
            )
        },
        "optim": str(args.optim),
        "lr_scheduler_type": str(args.lr_scheduler_type),
    }
