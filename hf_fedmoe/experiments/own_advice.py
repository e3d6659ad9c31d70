"""Advice for a run that ends no better than the majority class, or below its control."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..training import FedMoETrainingArguments


# Of the local loss over the rounds: less than this has hardly moved, and more in the last quarter is still falling.
HARDLY = 0.05
STILL = 0.03


@dataclass
class RunBeside:
    """
    A finished run beside others on the same test rows.

    Args:
        method (`str`): Its name.
        accuracy (`float`): Its accuracy.
        others (`dict[str, float]`): That of the majority class, `"majority_class"`, and of a control if there is one.
        num_rows (`int`): Test rows.
        losses (`list[float]`): The local loss of each round.
        num_labels (`int`): Classes.
    """

    method: str
    accuracy: float
    others: dict[str, float]
    num_rows: int
    losses: list[float]
    num_labels: int


def margin(accuracy: float, num_rows: int) -> float:
    """Two standard errors of an accuracy that was measured on so many rows."""
    spread = max(accuracy * (1 - accuracy), 1 / num_rows)
    return 2 * math.sqrt(spread / num_rows)


def advise(run: RunBeside, args: FedMoETrainingArguments, model: str) -> Iterator[str]:
    """
    Lines of advice, none for a run that is above the others.

    Args:
        run ([`RunBeside`]): What came out.
        args ([`FedMoETrainingArguments`]): What it was trained with.
        model (`str`): What it started from.
    """
    open_points = margin(run.accuracy, run.num_rows)
    above_majority = run.accuracy > run.others["majority_class"] + open_points
    if not above_majority:
        yield f"{run.method} is not clearly above always naming the most frequent class. Try"
        yield from _remedies(run, args, model)
    for name, accuracy in run.others.items():
        if name == "majority_class" or accuracy <= run.accuracy:
            continue
        points = f"{100 * (accuracy - run.accuracy):.1f} points"
        if accuracy - run.accuracy <= open_points:
            yield f"{name} is {points} above {run.method}, less than the test can tell apart: more test rows would."
            continue
        yield f"{name} is {points} above {run.method}: on these data it is the better choice, --method {name}."
        if above_majority:
            yield "Or try"
            yield from _remedies(run, args, model)


def _remedies(run: RunBeside, args: FedMoETrainingArguments, model: str) -> Iterator[str]:
    yield from _by_the_loss(run.losses, args)
    if not Path(model).is_dir() and "/" not in model:
        yield f"  a pretrained start in the place of {model}, --model FOLDER_OR_HUB_ID;"
    else:
        yield f"  a larger start than {Path(model).name}, pretrained on the language of your data, --model;"
    yield "  and look at the table of clients above: are labels right, and is there enough of each class?"


def _by_the_loss(losses: list[float], args: FedMoETrainingArguments) -> Iterator[str]:
    """Reads from the way of the loss whether the rate is wrong or the run too short; one round says nothing of it."""
    rate, late = args.learning_rate, losses[-max(2, len(losses) // 4) :]
    if len(losses) > 1 and not (math.isfinite(losses[-1]) and losses[-1] <= losses[0]):
        yield f"  --learning_rate {rate / 3:.1g}: the loss rose from {losses[0]:.3f} to {losses[-1]:.3f};"
    elif len(losses) > 1 and losses[-1] > (1 - HARDLY) * losses[0]:
        yield f"  --learning_rate {rate * 3:.1g}: the loss hardly moved, {losses[0]:.3f} to {losses[-1]:.3f};"
    if len(late) > 1 and late[-1] < (1 - STILL) * late[0]:
        yield f"  --rounds {2 * args.rounds}: the loss was still falling;"
    else:
        yield f"  --rounds {2 * args.rounds} or --num_train_epochs {2 * args.num_train_epochs:g};"
