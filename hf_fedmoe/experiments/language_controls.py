"""Trainings that a mixture of owners is compared with: federated averaging of LoRA, and one adapter on pooled text."""

from collections.abc import Mapping

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import TrainingArguments

from ..owners import fit_adapter


Sequences = list[list[int]]


def train_pooled(model: PeftModel, texts: Mapping[str, Sequences], args: TrainingArguments) -> PeftModel:
    """
    Trains one adapter on the text of all owners together, with the steps of all of them.

    Args:
        model (`PeftModel`): The adapter; changed.
        texts (`Mapping[str, list]`): Sequences of each owner.
        args (`TrainingArguments`): Of the Trainer.
    """
    fit_adapter(model, [row for rows in texts.values() for row in rows], args)
    return model


def train_fedavg(model: PeftModel, texts: Mapping[str, Sequences], args: TrainingArguments, rounds: int) -> PeftModel:
    """
    Trains one adapter by rounds: each owner trains on from the mean of the last round, on other sequences of its own
    each time; both factors are averaged. The learning rate falls from round to round.

    Args:
        model (`PeftModel`): The adapter; changed.
        texts (`Mapping[str, list]`): Sequences of each owner.
        args (`TrainingArguments`): Of the Trainer, with the steps of one round.
        rounds (`int`): Their number.
    """
    generator = torch.Generator().manual_seed(args.seed)
    size = args.max_steps * args.per_device_train_batch_size
    orders = {owner: torch.randperm(len(rows), generator=generator).tolist() for owner, rows in texts.items()}
    rate = args.learning_rate
    args.lr_scheduler_type = "constant"
    for number in range(rounds):
        args.learning_rate = rate * (1 - number / rounds)
        start = {name: value.clone() for name, value in get_peft_model_state_dict(model).items()}
        total = {name: torch.zeros_like(value) for name, value in start.items()}
        for owner, rows in texts.items():
            set_peft_model_state_dict(model, start)
            # Begins anew where an owner has fewer sequences than its steps read.
            own = [rows[orders[owner][place % len(rows)]] for place in range(number * size, (number + 1) * size)]
            fit_adapter(model, own, args)
            for name, value in get_peft_model_state_dict(model).items():
                total[name] += value / len(texts)
        set_peft_model_state_dict(model, total)
    return model
