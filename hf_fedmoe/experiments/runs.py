"""One run of a comparison: a method on a seed, in a folder of its own."""

import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import PrinterCallback
from transformers.utils import logging

from ..data import FederatedDataset
from ..reporting import RunResult
from ..training import FederatedTrainer, FedMoETrainingArguments
from .comparison import KINDS
from .experiment import Experiment
from .methods import (
    analyse,
    leave_as_it_is,
    majority_scores,
    make_trainer,
    metrics_of_tests,
    train_or_go_on,
)
from .named_strategies import CENTRALISED, MAJORITY, source_of
from .noted_rounds import NOTE, NotesRounds
from .settings import parse_settings, settings_of, typed


SCORES = ("accuracy", "macro_f1", "auc")
OF_CLIENTS = (*SCORES, "bottom_decile", "worst")


@dataclass
class Run:
    """One method on one seed: what a process of its own needs to know."""

    row: str
    kind: str
    method: str
    settings: dict[str, Any]
    seed: int
    folder: Path
    threads: int = 1

    def __str__(self) -> str:
        return f"{self.row}, seed {self.seed}"

    def parse(self) -> tuple[Experiment, FedMoETrainingArguments]:
        """The experiment and the arguments; raises `ValueError` when a setting is wrong."""
        settings = {"save_total_limit": 1, "disable_tqdm": True, **self.settings}
        settings |= {"seed": self.seed, "output_dir": str(self.folder)}
        experiment, args = parse_settings(KINDS[self.kind], settings)
        if args.logging_strategy == "no" or args.logging_steps > args.rounds:
            name = "logging_strategy" if args.logging_strategy == "no" else "logging_steps"
            raise ValueError(f"`{name}` is {settings[name]}, but the table counts what rounds log: leave it out.")
        if "save_steps" not in settings:
            # What a stop can lose at most is a fifth of a run.
            args.save_steps = max(1, args.rounds // 5)
        return experiment, args

    @property
    def identity(self) -> dict[str, Any]:
        """Gives what a finished run must have had in common to be taken for this one."""
        source = source_of(self.method)
        plugin = {} if source is None else {"plugin_sha256": hashlib.sha256(source.encode()).hexdigest()}
        return json.loads(json.dumps({"method": self.method, **self.settings, **plugin}))

    @property
    def result_file(self) -> Path:
        return self.folder / "result.json"

    def stored(self) -> dict[str, Any] | None:
        """
        Reads what the run has left when it has ended; `None` before that.

        Raises:
            `ValueError`: When it had other settings, or its file is damaged.
        """
        if not self.result_file.is_file():
            return None
        try:
            found = json.loads(self.result_file.read_text())
            theirs, ours = _canonical(self.kind, found["settings"]), _canonical(self.kind, self.identity)
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{str(self.result_file)!r} is damaged: delete it, and the run starts anew.") from None
        if theirs != ours:
            changed = sorted(name for name in theirs | ours if theirs.get(name) != ours.get(name))
            raise ValueError(
                f"{str(self.folder)!r} has a finished run with another {', '.join(changed)}: choose another `--out`, "
                "or delete that folder."
            )
        return found

    def result(self) -> RunResult | None:
        """The figures of the run when it has ended."""
        found = self.stored()
        if found is None:
            return None
        return RunResult(self.seed, found["metrics"], [(step, accuracy) for step, accuracy in found["curve"]])


def _canonical(kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without regard to how they were written: `1e-3` may be a text, a configuration JSON."""
    known = settings_of(KINDS[kind], FedMoETrainingArguments)
    return {name: typed(name, value, known[name]) if name in known else value for name, value in settings.items()}


def metric_names(method: str, experiment: Experiment) -> list[str]:
    """The metrics that a run leaves: what can be a column of a table."""
    if method == MAJORITY:
        return list(SCORES)
    names = [*SCORES, "megabytes_up", "megabytes_down", "seconds"]
    if experiment.client_test_share and method not in CENTRALISED:
        whose = ("clients", "clients_unseen") if experiment.unseen_share else ("clients",)
        names += [f"{prefix}_{name}" for prefix in whose for name in OF_CLIENTS]
    if method == "fedmoe":
        names += [f"{part}_{name}" for part in part_names(experiment) for name in SCORES]
        names.remove("oracle_expert_auc")
        names.append("disagreement")
    return names


def part_names(experiment: Experiment) -> list[str]:
    """The parts of a mixture that have metrics of their own."""
    numbers = range(experiment.num_routed_experts)
    return [
        *(["main_expert"] if experiment.num_main_experts else []),
        *(f"expert_{k}" for k in numbers),
        *("best_expert", "uniform_ensemble", "weight_average"),
        *(f"top_{k + 1}" for k in numbers),
        *("dense", "oracle_expert"),
    ]


def execute(run: Run) -> None:
    """Trains and tests one method on one seed, and leaves `result.json` in its folder."""
    _be_quiet(run.threads)
    experiment, args = run.parse()
    processor = experiment.load_processor()
    _, data = experiment.load_data(processor, run.seed)
    if run.method == MAJORITY:
        metrics, curve = majority_scores(data), []
    else:
        trainer = make_trainer(run.method, experiment, args, data, processor)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(NotesRounds(run.folder))
        train_or_go_on(trainer)
        metrics, curve = _metrics(trainer, data), _curve(trainer)
        if run.method in CENTRALISED:  # its one client is the server
            metrics |= {"megabytes_up": 0.0, "megabytes_down": 0.0}
    run.folder.mkdir(parents=True, exist_ok=True)
    unfinished = run.folder / "unfinished.json"
    unfinished.write_text(json.dumps({"metrics": metrics, "curve": curve, "settings": run.identity}, indent=2) + "\n")
    unfinished.rename(run.result_file)
    (run.folder / NOTE).unlink(missing_ok=True)
    for leftover in ("checkpoint-*", "_clients"):
        for folder in run.folder.glob(leftover):
            shutil.rmtree(folder)


def try_out(runs: list[Run]) -> None:
    """
    Makes everything that runs need up to their training: data sets are loaded and divided for every seed, models and
    trainers are built for the first seed of each row.

    Raises:
        `ValueError`: When one of them cannot be made, naming its row.
    """
    _be_quiet(runs[0].threads)
    tried, loaded = set(), {}
    with tempfile.TemporaryDirectory() as scratch:
        for run in runs:
            try:
                experiment, args = replace(run, folder=Path(scratch)).parse()
                key = json.dumps(experiment.data_settings, sort_keys=True, default=str)
                if key not in loaded:
                    processor = experiment.load_processor()
                    _, source = experiment.source()
                    data = experiment.prepare(experiment.split(source, run.seed), processor)
                    loaded[key] = processor, source, experiment.hold_out(data, run.seed), {run.seed}
                processor, source, data, divided = loaded[key]
                if run.seed not in divided:
                    experiment.hold_out(experiment.split(source, run.seed), run.seed)
                    divided.add(run.seed)
                if run.row not in tried and run.method != MAJORITY:
                    make_trainer(run.method, experiment, args, data, processor, train_first=leave_as_it_is)
                tried.add(run.row)
            except (ValueError, OSError, ImportError) as error:
                raise ValueError(f"{run}: {' '.join(str(error).split())}") from error


def _be_quiet(threads: int) -> None:
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _metrics(trainer: FederatedTrainer, data: FederatedDataset) -> dict[str, float]:
    metrics = metrics_of_tests(trainer, data)
    if trainer.strategy.name == "fedmoe":
        analysis = analyse(trainer, data, trainer.args.eval_batch_size)
        for part, scores in analysis.scores.items():
            metrics |= {f"{part}_{name}": value for name, value in scores.items()}
        others = ~np.eye(len(analysis.disagreement_SS), dtype=bool)
        metrics["disagreement"] = float(analysis.disagreement_SS[others].mean())
    rounds = [entry for entry in trainer.state.log_history if "seconds_server" in entry]
    seconds = [sum(value for name, value in entry.items() if name.startswith("seconds_")) for entry in rounds]
    return metrics | {
        "megabytes_up": float(np.mean([entry.get("bytes_up", np.nan) for entry in rounds])) / 1e6,
        "megabytes_down": float(np.mean([entry.get("bytes_down", np.nan) for entry in rounds])) / 1e6,
        "seconds": float(np.mean(seconds)),
    }


def _curve(trainer: FederatedTrainer) -> list[tuple[int, float]]:
    entries = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]
    return [(int(entry["step"]), entry["eval_accuracy"]) for entry in entries if entry["step"]]
