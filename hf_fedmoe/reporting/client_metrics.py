"""Metrics by client: a table with a row for each, its summary, its picture.

Shape suffixes: N test examples of one client, C classes.
"""

import csv
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import f1_score

from .auc import macro_auc


@dataclass(frozen=True)
class ClientScore:
    """
    A client's model on the client's own test rows.

    Args:
        client (`int`): Its number.
        name (`str`): Its name, the number if it has none.
        unseen (`bool`): Whether it belongs to those that take part in no round.
        train_size (`int`): Its training examples.
        test_size (`int`): Its test examples.
        accuracy (`float`): Share of them that is right.
        macro_f1 (`float`): Mean F1 over the classes among its test examples and predictions.
        auc (`float`): Mean area under the ROC curve of each class among its test examples against the rest; NaN where
            all have one class.
    """

    client: int
    name: str
    unseen: bool
    train_size: int
    test_size: int
    accuracy: float
    macro_f1: float
    auc: float


def score_client(
    client: int, name: str, unseen: bool, train_size: int, probabilities_NC: np.ndarray, labels_N: np.ndarray
) -> ClientScore:
    """
    Scores one client.

    Args:
        client (`int`), name (`str`), unseen (`bool`), train_size (`int`): See [`ClientScore`].
        probabilities_NC (`np.ndarray` of shape `[N, C]`): Predicted probabilities of the classes.
        labels_N (`np.ndarray` of shape `[N]`): True classes.
    """
    predicted_N = probabilities_NC.argmax(-1)
    # A client has few of the classes; the absent ones say nothing about its model.
    macro_f1 = float(f1_score(labels_N, predicted_N, average="macro", zero_division=0))
    accuracy, auc = float((predicted_N == labels_N).mean()), macro_auc(probabilities_NC, labels_N)
    return ClientScore(client, name, unseen, train_size, len(labels_N), accuracy, macro_f1, auc)


def summarise_clients(table: Sequence[ClientScore]) -> dict[str, float]:
    """
    The figures in which personalised methods are compared, those of unseen clients apart as `unseen_...`.

    Returns:
        `dict[str, float]`: `accuracy`, `macro_f1` and `auc` (means weighted by test size, that of `auc` over the
        clients that have one), `bottom_decile` (10th percentile of the clients' accuracies, interpolated linearly) and
        `worst` (the lowest of them).
    """
    summary: dict[str, float] = {}
    for prefix, unseen in (("", False), ("unseen_", True)):
        rows = [row for row in table if row.unseen == unseen]
        if not rows:
            continue
        accuracies, sizes = [row.accuracy for row in rows], [row.test_size for row in rows]
        summary |= {
            f"{prefix}accuracy": float(np.average(accuracies, weights=sizes)),
            f"{prefix}macro_f1": float(np.average([row.macro_f1 for row in rows], weights=sizes)),
            f"{prefix}auc": _mean_auc(rows),
            f"{prefix}bottom_decile": float(np.percentile(accuracies, 10)),
            f"{prefix}worst": min(accuracies),
        }
    return summary


def _mean_auc(rows: Sequence[ClientScore]) -> float:
    rows = [row for row in rows if not math.isnan(row.auc)]
    return float(np.average([row.auc for row in rows], weights=[row.test_size for row in rows])) if rows else math.nan


def write_client_table(table: Sequence[ClientScore], path: str | os.PathLike) -> None:
    """Writes the table as CSV, a line for each client."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [field.name for field in fields(ClientScore)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows([vars(row)[name] for name in names] for row in table)


def read_client_table(path: str | os.PathLike) -> list[ClientScore]:
    """Reads what [`write_client_table`] wrote; tables from before clients had names have none."""
    with Path(path).open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    read: dict[str, Callable[[str], Any]] = {
        "client": int,
        "name": str,
        "unseen": lambda text: text == "True",
        "train_size": int,
        "test_size": int,
    }
    lines = [{"name": line["client"]} | line for line in lines]
    return [ClientScore(**{name: read.get(name, float)(text) for name, text in line.items()}) for line in lines]


def plot_clients(tables: Mapping[str, Sequence[ClientScore]], path: str | os.PathLike) -> None:
    """
    Saves the sorted accuracies of the clients, a curve for each method; those of unseen clients beside them.

    Args:
        tables (`Mapping[str, Sequence[ClientScore]]`): The clients' scores by name of the method.
        path (`str`): Where the picture goes; its ending chooses the format.
    """
    from matplotlib.figure import Figure  # drawing without pyplot needs no display and no backend

    panels = {False: "Share of clients"}
    if any(row.unseen for table in tables.values() for row in table):
        panels[True] = "Share of unseen clients"
    figure = Figure(figsize=(2 + 4 * len(panels), 3.8), layout="constrained")
    rows_of_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    for axes, (unseen, label) in zip(rows_of_axes[0], panels.items(), strict=True):
        for number, (name, table) in enumerate(tables.items()):
            accuracies = sorted(row.accuracy for row in table if row.unseen == unseen)
            share = (np.arange(len(accuracies)) + 0.5) / max(1, len(accuracies))
            style = dict(color=f"C{number % 10}", linestyle="-" if number < 10 else "--")
            axes.plot(share, accuracies, marker=".", markersize=3, label=name.replace("$", r"\$"), **style)
        axes.axvline(0.1, color="0.8", linewidth=0.8)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel(label)
    rows_of_axes[0][0].set_ylabel("Accuracy on own test rows")
    handles = rows_of_axes[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=150)
