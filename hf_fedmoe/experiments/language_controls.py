"""Trainings that a mixture of owners is compared with: federated averaging of LoRA, and one adapter on pooled text.

Shape suffixes: m owners, P elements of an adapter's row.
"""

from collections.abc import Iterable, Mapping

import torch
from peft import PeftModel
from transformers import TrainingArguments

from ..models import as_expert
from ..owners import fit_adapter
from ..weights import StateLayout, fuse_models_


Sequences = list[list[int]]


def train_pooled(model: PeftModel, texts: Mapping[str, Sequences], args: TrainingArguments) -> PeftModel:
    """
    Trains one adapter on the text of all owners together, with the steps of all of them.

    Args:
        model (`PeftModel`): The adapter; changed.
        texts (`Mapping[str, list]`): Sequences of each owner.
        args (`TrainingArguments`): Of the Trainer.
    """
    fit_adapter(model, _learned(row for rows in texts.values() for row in rows), args)
    return model


def train_fedavg(
    model: PeftModel, texts: Mapping[str, Sequences], args: TrainingArguments, rounds: int, fusion: str = "factors"
) -> PeftModel:
    """
    Trains one adapter by rounds: each owner trains on from the mean of the last round, on other sequences of its own
    each time. The learning rate falls from round to round.

    Args:
        model (`PeftModel`): The adapter; changed.
        texts (`Mapping[str, list]`): Sequences of each owner.
        args (`TrainingArguments`): Of the Trainer, with the steps of one round.
        rounds (`int`): Their number.
        fusion (`str`, *optional*, defaults to `"factors"`): What is averaged: `"factors"` (A and B each by itself) or
            `"svd"` (their products exactly, then cut to their rank by the best approximation there is).
    """
    generator = torch.Generator().manual_seed(args.seed)
    size = args.max_steps * args.per_device_train_batch_size
    orders = {owner: torch.randperm(len(rows), generator=generator).tolist() for owner, rows in texts.items()}
    rate = args.learning_rate
    args.lr_scheduler_type = "constant"
    adapter = as_expert(model)
    layout = StateLayout.of(adapter, lora_products=fusion == "svd")
    server_1P = layout.read(adapter)[None]
    weights_1m = torch.full((1, len(texts)), 1 / len(texts), device=server_1P.device)
    for number in range(rounds):
        args.learning_rate = rate * (1 - number / rounds)
        rows_mP = []
        for owner, rows in texts.items():
            layout.write(server_1P[0], adapter)
            # Begins anew where an owner has fewer sequences than its steps read.
            own = [rows[orders[owner][place % len(rows)]] for place in range(number * size, (number + 1) * size)]
            fit_adapter(model, _learned(own), args)
            rows_mP.append(layout.read(adapter).to(server_1P))
        fuse_models_(server_1P, torch.stack(rows_mP), weights_1m, server_1P.new_zeros(1), layout)
    layout.write(server_1P[0], adapter)
    return model


def _learned(sequences: Iterable[list[int]]) -> list[dict[str, list[int]]]:
    """Rows of which all tokens are learned."""
    return [{"input_ids": row, "labels": row} for row in sequences]
