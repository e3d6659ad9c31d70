"""
Learning curves of methods over seeds, as a picture.

Shape suffixes: R runs of a method, N rounds that were evaluated.
"""

import os
import textwrap
from typing import Any

import numpy as np

from .comparison import RunResult
from .metric import METRICS, Metric


# More in a panel cannot be told apart.
CURVES_IN_A_PANEL = 4
# Characters of a row's name in a legend, and of a line of it.
_LONGEST_NAME, _LINE = 200, 40


def plot_learning_curves(
    results: dict[str, list[RunResult]],
    path: str | os.PathLike,
    reference: str | None = None,
    metric: Metric = METRICS["accuracy"],
) -> None:
    """
    Saves a validation metric by round, and below by what was sent and received until then: four methods in a panel,
    each seed as a thin line, their mean as a thick one.

    Args:
        results (`dict[str, list[RunResult]]`): By row; those without a curve are left out.
        path (`str`): Where the picture goes; its ending chooses the format.
        reference (`str`, *optional*): The row that is in every panel, in black.
        metric ([`Metric`], *optional*): The one that the curves are of; accuracy if left out.
    """
    from matplotlib.figure import Figure  # drawing without pyplot needs no display and no backend

    drawn = {row: runs for row, runs in results.items() if runs and all(run.curve for run in runs)}
    others = [row for row in drawn if row != reference]
    groups = [others[i : i + CURVES_IN_A_PANEL] for i in range(0, len(others), CURVES_IN_A_PANEL)] or [[]]
    figure = Figure(figsize=(1 + 4.5 * len(groups), 7), layout="constrained")
    panels = figure.subplots(2, len(groups), sharey=True, squeeze=False)
    for group, (by_round, by_megabytes) in zip(groups, panels.T, strict=True):
        colors = {row: f"C{number}" for number, row in enumerate(group)}
        if reference in drawn:
            colors[str(reference)] = "black"
        for row, color in colors.items():
            _draw(by_round, drawn[row], 1.0, metric.factor, color=color, label=_label(row))
            _draw(by_megabytes, drawn[row], _megabytes(drawn[row]), metric.factor, color=color)
        by_round.set_xlabel("Round")
        by_round.xaxis.get_major_locator().set_params(integer=True)
        by_megabytes.set_xlabel("MB sent and received by all participants")
        if colors:
            # Where curves are not: they rise to the right, or fall.
            by_round.legend(fontsize="small", loc="upper right" if metric.lower_is_better else "lower right")
    for axes in panels[:, 0]:
        axes.set_ylabel(f"Validation {metric.heading} of the server's model{', %' if metric.factor == 100 else ''}")
    figure.savefig(path, dpi=150)


def _label(row: str) -> str:
    """Writes a row's name for a legend: no formula, in lines of which a panel has room, and no reason to hide it."""
    name = textwrap.fill(row[:_LONGEST_NAME], _LINE).replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name  # which Matplotlib takes for one that nobody is to see


def _draw(
    axes: Any, runs: list[RunResult], unit: float, factor: float, label: str | None = None, **style: Any
) -> None:
    """Draws the runs of a method; `unit` is what a round takes on the axis below, `factor` what values are told in."""
    length = min(len(run.curve) for run in runs)
    x_N = unit * np.array([number for number, _ in runs[0].curve[:length]])
    values_RN = factor * np.array([[value for _, value in run.curve[:length]] for run in runs])
    axes.plot(x_N, values_RN.mean(0), linewidth=1.8, label=label, **style)
    for values_N in values_RN if len(runs) > 1 else ():
        axes.plot(x_N, values_N, linewidth=0.6, alpha=0.5, **style)


def _megabytes(runs: list[RunResult]) -> float:
    """Sums up what a round sends and receives; NaN, which nothing is drawn at, where that is no model."""
    up, down = ([run.metrics.get(name, np.nan) for run in runs] for name in ("megabytes_up", "megabytes_down"))
    return float(np.mean(np.add(up, down)))
