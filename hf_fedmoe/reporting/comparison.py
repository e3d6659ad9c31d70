"""Methods side by side over seeds: a table in Markdown, and all figures as CSV."""

import csv
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .markdown import plain
from .metric import METRICS, Metric, metric_named


@dataclass
class RunResult:
    """
    One method on one seed.

    Args:
        seed (`int`): Of the run.
        metrics (`dict[str, float]`): Of the test, and `megabytes_up`, `megabytes_down` and `seconds` of a mean round.
        curve (`list[tuple[int, float]]`, *optional*): Accuracy, or what counts of other models, on the validation set
            after some of the rounds.
    """

    seed: int
    metrics: dict[str, float]
    curve: list[tuple[int, float]] = field(default_factory=list)


def mean_and_spread(values: list[float], metric: Metric) -> str:
    """Mean ± standard deviation over seeds, in per cent or in the metric's own unit; empty where one is missing."""
    scaled = np.array(values) * metric.factor
    if len(scaled) == 0 or np.isnan(scaled).any():
        return ""
    spread = f" ± {scaled.std(ddof=1):.{metric.digits}f}" if len(scaled) > 1 else ""
    return f"{scaled.mean():.{metric.digits}f}{spread}"


def comparison_table(
    results: dict[str, list[RunResult]],
    columns: list[str],
    parts: list[str] | None = None,
    reference: str | None = None,
    published: dict[str, str] | None = None,
    metrics: Mapping[str, Metric] = METRICS,
) -> str:
    """
    A Markdown table with a row for each method.

    Args:
        results (`dict[str, list[RunResult]]`): By row, in their order.
        columns (`list[str]`): Names of metrics.
        parts (`list[str]`, *optional*): Parts of a mixture that have rows of their own below it, `main_expert` say:
            those of which `main_expert_accuracy` and so on are among the metrics.
        reference (`str`, *optional*): A row; the others get a column that counts the seeds on which it is better in
            the first column: above them, or below where lower is better.
        published (`dict[str, str]`, *optional*): Figures to stand beside, by row.
        metrics (`Mapping[str, Metric]`, *optional*): How each is shown; those of classifiers if left out.
    """
    shown = [metric_named(name, metrics) for name in columns]
    headings = [metric.heading for metric in shown]
    if reference is not None:
        headings.append(plain(f"{reference} {'below' if shown[0].lower_is_better else 'above'}, of seeds"))
    if published:
        headings.append("published")
    lines = [f"| | {' | '.join(headings)} |", f"|---|{'---|' * len(headings)}"]
    for row, runs in results.items():
        cells = _cells(runs, columns, shown)
        if reference is not None:
            cells.append("" if row == reference else _wins(results[reference], runs, columns[0], shown[0]))
        if published:
            cells.append(plain(published.get(row, "")))
        lines.append(f"| {plain(row)} | {' | '.join(cells)} |")
        for part in parts or []:
            names = [f"{part}_{name}" for name in columns]
            if not any(name in run.metrics for name in names for run in runs):
                continue
            cells = _cells(runs, names, shown)
            empty = [""] * (len(headings) - len(columns))
            lines.append(f"| — {part.replace('_', ' ')} | {' | '.join(cells + empty)} |")
    return "\n".join(lines)


def _cells(runs: list[RunResult], names: list[str], shown: list[Metric]) -> list[str]:
    """Metrics of the same kinds as the columns, `names` of a row's own or of one of its parts."""
    return [
        mean_and_spread([run.metrics.get(name, np.nan) for run in runs], metric)
        for name, metric in zip(names, shown, strict=True)
    ]


def _wins(reference: list[RunResult], runs: list[RunResult], name: str, metric: Metric) -> str:
    """On how many of the common seeds the reference is better."""
    theirs = {run.seed: run.metrics.get(name, np.nan) for run in runs}
    pairs = [(run.metrics.get(name, np.nan), theirs[run.seed]) for run in reference if run.seed in theirs]
    return f"{sum(metric.is_better(mine, other) for mine, other in pairs)} / {len(pairs)}"


def write_comparison(results: dict[str, list[RunResult]], path: str | os.PathLike) -> None:
    """Writes every metric of every run as CSV, a line for each run."""
    names = list(dict.fromkeys(name for runs in results.values() for run in runs for name in run.metrics))
    with Path(path).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "seed", *names])
        for row, runs in results.items():
            writer.writerows([row, run.seed, *(run.metrics.get(name, "") for name in names)] for run in runs)
