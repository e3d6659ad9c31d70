"""
Methods side by side over seeds, from one YAML: equal clients, reserved sets, initial weights, draws and local steps.

Every run has a folder of its own. A finished one is only read again, one that was stopped goes on from its last
checkpoint.
"""

import dataclasses
import json
import multiprocessing
import os
import re
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import yaml
from transformers import PrinterCallback
from transformers.utils import logging

from ..data import FederatedDataset
from ..reporting import (
    ClientScore,
    RunResult,
    comparison_table,
    plot_clients,
    plot_learning_curves,
    read_client_table,
    write_comparison,
)
from ..training import FederatedTrainer, FederatedTrainingArguments
from ..training.client_evaluation import CLIENT_TABLE_NAME
from .characters import CharacterExperiment
from .experiment import Experiment, parse_settings, read_preset
from .images import ImageExperiment
from .methods import (
    CENTRALISED,
    analyse,
    check_method,
    majority_scores,
    make_trainer,
    metrics_of_tests,
    own_settings,
    train_or_go_on,
)
from .texts import TextExperiment


KINDS: dict[str, type[Experiment]] = {
    "texts": TextExperiment,
    "images": ImageExperiment,
    "characters": CharacterExperiment,
}
MAJORITY = "majority_class"


@dataclass
class Comparison:
    """
    What a YAML of `hf-fedmoe compare` says.

    Args:
        kind (`str`): `"texts"`, `"images"` or `"characters"`.
        methods (`dict[str, str | dict]`): By row of the table: a method's name, or `method` and settings that differ
            from those of all. What its strategy has an argument for is the strategy's.
        seeds (`list[int]`, *optional*, defaults to `[0, 1, 2]`): One run of each method for each.
        recipe (`str`, *optional*): A recipe's YAML, relative to this one. Its block `quick`, or what a size names as
            `recipe_preset`, gives settings.
        settings (`dict`, *optional*): Any of an experiment and of [`FederatedTrainingArguments`].
        sizes (`dict[str, dict]`, *optional*): By name, settings that make the comparison small or large, and under
            `methods` those of single rows. The first is taken unless told.
        columns (`list[str]`, *optional*): Metrics of the table.
        parts (`list[str]`, *optional*): Parts of mixtures with rows of their own.
        reference (`str`, *optional*): The row that the others are counted against.
        published (`dict[str, str]`, *optional*): Figures of a paper, by row.
    """

    kind: str
    methods: dict[str, Any]
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    recipe: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, dict[str, Any]] = field(default_factory=dict)
    columns: list[str] = field(default_factory=lambda: ["accuracy", "macro_f1"])
    parts: list[str] = field(default_factory=list)
    reference: str | None = None
    published: dict[str, str] = field(default_factory=dict)


@dataclass
class Run:
    """One method on one seed: what a process of its own needs to know."""

    kind: str
    method: str
    settings: dict[str, Any]
    seed: int
    folder: Path

    def parse(self) -> tuple[Experiment, FederatedTrainingArguments]:
        """The experiment and the arguments; raises `ValueError` when a setting is wrong."""
        settings = {"save_total_limit": 1, "disable_tqdm": True, **self.settings}
        settings |= {"seed": self.seed, "output_dir": str(self.folder)}
        experiment, args = parse_settings(KINDS[self.kind], settings, [])
        if "save_steps" not in settings:
            # What a stop can lose at most is a fifth of a run.
            args.save_steps = max(1, args.rounds // 5)
        return experiment, args


def read_comparison(path: Path) -> Comparison:
    """Reads a YAML; raises `ValueError` when it is none of a comparison."""
    given = yaml.safe_load(path.read_text())
    known = [field.name for field in dataclasses.fields(Comparison)]
    for name in given:
        if name not in known:
            raise ValueError(f"{path.name} has {name!r}: a comparison has {', '.join(known)}.")
    for name in ("kind", "methods"):
        if not given.get(name):
            raise ValueError(f"{path.name} has no {name!r}: a comparison needs `kind` and `methods`.")
    comparison = Comparison(**given)
    if comparison.kind not in KINDS:
        raise ValueError(f"`kind` is {comparison.kind!r}: choose one of {', '.join(map(repr, KINDS))}.")
    of_sizes = (row for size in comparison.sizes.values() for row in size.get("methods", {}))
    for name in filter(None, (comparison.reference, *comparison.published, *of_sizes)):
        if name not in comparison.methods:
            raise ValueError(f"{path.name} names a row {name!r}: `methods` has {', '.join(comparison.methods)}.")
    return comparison


def plan_runs(
    comparison: Comparison, where: Path, out: Path, size: str | None = None, overrides: dict[str, Any] | None = None
) -> dict[str, list[Run]]:
    """
    The runs by row of the table. Raises `ValueError` when a method or setting is wrong, before anything is trained.

    Args:
        comparison ([`Comparison`]): What to run.
        where (`Path`): The folder that `recipe` is relative to.
        out (`Path`): Folder of the runs.
        size (`str`, *optional*): One of `comparison.sizes`.
        overrides (`dict`, *optional*): Settings that go before all others.
    """
    if size is not None and size not in comparison.sizes:
        raise ValueError(f"`size` is {size!r}: this comparison has {', '.join(comparison.sizes) or 'one size only'}.")
    chosen = dict(comparison.sizes[size]) if size else {}
    common = read_preset(where / comparison.recipe, chosen.pop("recipe_preset", "quick")) if comparison.recipe else {}
    of_rows = chosen.pop("methods", {})
    common = common | comparison.settings | chosen
    with_lora = common.pop("with_lora", {})
    runs: dict[str, list[Run]] = {}
    for row, given in comparison.methods.items():
        differing = ({"method": given} if isinstance(given, str) else given) | of_rows.get(row, {})
        method = differing.pop("method", row)
        own = {name: differing.pop(name) for name in own_settings(method) if name in differing}
        differing |= overrides or {}
        rates = with_lora if (common | differing).get("peft") == "lora" else {}
        settings = common | rates | differing | {"method_settings": {method: own} if own else {}}
        folder = out / re.sub(r"\W+", "-", row.replace("+", " plus ")).strip("-").lower()
        runs[row] = [
            Run(comparison.kind, method, settings, seed, folder / f"seed-{seed}") for seed in comparison.seeds
        ]
        experiment, _ = runs[row][0].parse()
        if method != MAJORITY:
            check_method(method, experiment)
    folders = [row_runs[0].folder for row_runs in runs.values()]
    if len(set(folders)) < len(folders):
        raise ValueError(f"`methods` has rows that differ in signs only, {', '.join(runs)}: name them otherwise.")
    return runs


def execute(run: Run, threads: int) -> None:
    """Trains and tests one method on one seed, and leaves `result.json` in its folder."""
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    experiment, args = run.parse()
    processor = experiment.load_processor()
    _, data = experiment.load_data(processor, run.seed)
    if run.method == MAJORITY:
        result = {"metrics": majority_scores(data), "curve": []}
    else:
        trainer = make_trainer(run.method, experiment, args, data, processor)
        trainer.remove_callback(PrinterCallback)
        train_or_go_on(trainer)
        result = {"metrics": _metrics(trainer, data), "curve": _curve(trainer)}
        if run.method in CENTRALISED:  # its one client is the server
            result["metrics"] |= {"megabytes_up": 0.0, "megabytes_down": 0.0}
    run.folder.mkdir(parents=True, exist_ok=True)
    unfinished = run.folder / "unfinished.json"
    unfinished.write_text(json.dumps({**result, "settings": _identity(run)}, indent=2) + "\n")
    unfinished.rename(run.folder / "result.json")
    for leftover in ("checkpoint-*", "_clients"):
        for folder in run.folder.glob(leftover):
            shutil.rmtree(folder)


def _identity(run: Run) -> dict[str, Any]:
    return json.loads(json.dumps({"method": run.method, **run.settings}))


def _metrics(trainer: FederatedTrainer, data: FederatedDataset) -> dict[str, float]:
    metrics = metrics_of_tests(trainer, data)
    if trainer.strategy.name == "fedmoe":
        analysis = analyse(trainer, data, trainer.args.eval_batch_size)
        for part, scores in analysis.scores.items():
            metrics |= {f"{part}_{name}": value for name, value in scores.items()}
        others = ~np.eye(len(analysis.disagreement_SS), dtype=bool)
        metrics["disagreement"] = float(analysis.disagreement_SS[others].mean())
    rounds = [entry for entry in trainer.state.log_history if "bytes_up" in entry]
    seconds = [sum(value for name, value in entry.items() if name.startswith("seconds_")) for entry in rounds]
    return metrics | {
        "megabytes_up": float(np.mean([entry["bytes_up"] for entry in rounds])) / 1e6,
        "megabytes_down": float(np.mean([entry["bytes_down"] for entry in rounds])) / 1e6,
        "seconds": float(np.mean(seconds)),
    }


def _curve(trainer: FederatedTrainer) -> list[tuple[int, float]]:
    entries = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]
    return [(entry["step"], entry["eval_accuracy"]) for entry in entries if entry["step"]]


def run_all(runs: dict[str, list[Run]], num_jobs: int) -> dict[str, list[RunResult]]:
    """
    The results of all runs; a finished one is only read.

    Raises:
        `ValueError`: When a finished run had other settings.
    """
    waiting = []
    for run in (run for row_runs in runs.values() for run in row_runs):
        if not (run.folder / "result.json").is_file():
            waiting.append(run)
        elif (settings := json.loads((run.folder / "result.json").read_text())["settings"]) != _identity(run):
            changed = sorted(k for k in settings | _identity(run) if settings.get(k) != _identity(run).get(k))
            raise ValueError(
                f"{run.folder} has a finished run with another {', '.join(changed)}: choose another `--out`, or "
                "delete that folder."
            )
    # Two processes that wait for one another's threads take many times as long.
    threads = int(os.environ.get("OMP_NUM_THREADS", max(1, (os.cpu_count() or 1) // num_jobs)))
    # Seed by seed, so that a table of few seeds is there early.
    waiting.sort(key=lambda run: run.seed)
    with ProcessPoolExecutor(num_jobs, multiprocessing.get_context("spawn")) as pool:
        running = [(run, pool.submit(execute, run, threads)) for run in waiting]
        for number, (run, done) in enumerate(running, start=1):
            try:
                done.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            print(f"{number} of {len(running)}: {run.folder.parent.name}, seed {run.seed}", flush=True)
    results = {}
    for row, row_runs in runs.items():
        found = [json.loads((run.folder / "result.json").read_text()) for run in row_runs]
        results[row] = [
            RunResult(run.seed, result["metrics"], [tuple(point) for point in result["curve"]])
            for run, result in zip(row_runs, found, strict=True)
        ]
    return results


def compare(
    path: str | Path,
    out: str | Path | None = None,
    size: str | None = None,
    seeds: list[int] | None = None,
    rows: list[str] | None = None,
    num_jobs: int = 1,
    overrides: dict[str, Any] | None = None,
) -> str:
    """
    Runs a comparison and writes `table.md`, `results.csv` and `curves.png` into its folder. Where clients have test
    rows there is `clients.png` too: how each method serves the clients, those of all seeds together.

    Args:
        path (`str` or `Path`): The YAML, see [`Comparison`].
        out (`str` or `Path`, *optional*): The folder; `runs/compare/<name of the YAML>/<size>` if left out.
        size (`str`, *optional*): One of its `sizes`; the first if left out.
        seeds (`list[int]`, *optional*): In the place of its own.
        rows (`list[str]`, *optional*): Of its methods, only these.
        num_jobs (`int`, *optional*, defaults to 1): Runs side by side.
        overrides (`dict`, *optional*): Settings that go before those of the YAML.

    Returns:
        `str`: The table.

    Raises:
        `ValueError`: When the YAML, a method or a setting is wrong, before anything is trained.
    """
    path = Path(path)
    comparison = read_comparison(path)
    comparison.seeds = seeds or comparison.seeds
    for row in rows or []:
        if row not in comparison.methods:
            raise ValueError(f"There is no row {row!r}: {path.name} has {', '.join(comparison.methods)}.")
    if rows:
        comparison.methods = {row: comparison.methods[row] for row in rows}
    size = size or next(iter(comparison.sizes), None)
    out = Path(out or Path("runs", "compare", path.stem, size or ""))
    runs = plan_runs(comparison, path.parent, out, size, overrides)
    results = run_all(runs, num_jobs)
    reference = comparison.reference if comparison.reference in results else None
    table = comparison_table(results, comparison.columns, comparison.parts, reference, comparison.published)
    (out / "table.md").write_text(table + "\n")
    write_comparison(results, out / "results.csv")
    plot_learning_curves(results, out / "curves.png")
    if tables := _client_tables(runs):
        plot_clients(tables, out / "clients.png")
    return table


def _client_tables(runs: dict[str, list[Run]]) -> dict[str, list[ClientScore]]:
    """The scores of all seeds' clients by row, of the rows that have some."""
    tables = {}
    for row, row_runs in runs.items():
        files = [run.folder / CLIENT_TABLE_NAME for run in row_runs]
        if scores := [score for file in files if file.is_file() for score in read_client_table(file)]:
            tables[row] = scores
    return tables
