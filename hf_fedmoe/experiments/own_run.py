"""One run on own data: a method, beside it the majority class and a control, and a model on disk with its card."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from ..data import FederatedDataset
from ..data.counted import counted
from ..reporting import plot_clients, plot_gate
from ..training import FederatedTrainer, FedMoETrainingArguments
from .folders import check_writable
from .methods import (
    analyse,
    check_method,
    has_begun,
    leave_as_it_is,
    majority_scores,
    make_trainer,
    metrics_of_tests,
    train_or_go_on,
)
from .own_advice import RunBeside, advise, margin
from .own_data import OwnData, parse_own
from .rehearsal import rehearse


# A control that takes longer is run only when it is asked for.
CHEAP_SECONDS = 300.0
NO_CONTROL = "none"
METRICS = ("accuracy", "macro_f1", "auc")


@dataclass
class _Run:
    """Settings and data that all methods of a run have in common."""

    experiment: OwnData
    args: FedMoETrainingArguments
    data: FederatedDataset
    processor: Any
    folder: Path

    def train(self, method: str) -> tuple[FederatedTrainer, dict[str, float], float]:
        """Trains a method in a folder of its own, or goes on there: its trainer, metrics and seconds."""
        args = self.args
        print(
            f"\n{method}: {counted(args.rounds, 'round')} of {args.clients_per_round} of "
            f"{counted(self.data.num_clients, 'client')}, learning rate {args.learning_rate:g}, seed {args.seed}",
            flush=True,
        )
        args.output_dir = str(self.folder / method)
        trainer = make_trainer(method, self.experiment, args, self.data, self.processor)
        started = time.monotonic()
        train_or_go_on(trainer)
        seconds = time.monotonic() - started
        return trainer, metrics_of_tests(trainer, self.data), seconds


def train_own(told: dict[str, Any], images: bool, method: str = "fedmoe", control: str | None = None) -> None:
    """
    Trains on clients' own files or folders, tells what it is worth, and saves the model, its card and pictures.

    Args:
        told (`dict`): Settings by name, texts of a command line or values: those of [`OwnTexts`] or [`OwnImages`] and
            of [`FedMoETrainingArguments`].
        images (`bool`): Whether `clients` are folders of images, not files of texts.
        method (`str`, *optional*, defaults to `"fedmoe"`): One of [`method_names`].
        control (`str`, *optional*): A method of the same start and rounds to compare with, `"none"` for none. By
            default FedAvg, fine-tuned on the reserved set where `method` reads that too, if it takes five minutes at
            most.

    Raises:
        ValueError: Before anything is trained, when something is wrong with the files or a setting.
    """
    experiment, args = parse_own({"output_dir": "runs/own", **told}, images)
    for name in [method] + ([control] if control not in (None, NO_CONTROL) else []):
        check_method(str(name), experiment, args)
    assert args.output_dir is not None  # `TrainingArguments` have one by now
    folder = Path(args.output_dir)
    check_writable(folder, "output_dir")
    reading = counted(len(experiment.clients), "client")
    print(f"Reading {reading}, and starting from {_shown(experiment.model_name)}", flush=True)
    processor = experiment.load_processor()
    data = experiment.read(args.seed)
    print(data.summary(), flush=True)
    if method == "fedmoe" and data.reserved is None:
        raise ValueError("`reserved` is 0, but fedmoe learns on labelled rows of the server: give a file, or a share.")
    with _bars_of_datasets():
        data = experiment.make_ready(data, processor, args.seed)
    if remark := experiment.remark(data):
        print(remark, flush=True)
    run = _Run(experiment, args, data, processor, folder)
    args.output_dir = str(folder / method)
    make_trainer(method, experiment, args, data, processor, train_first=leave_as_it_is)
    if experiment.rehearse and not has_begun(args.output_dir):
        print(f"{method} takes {rehearse(method, experiment, args, data, processor)}.", flush=True)
    data.plot(folder / "clients.png")

    results = {"majority_class": majority_scores(data)}
    trainer, own, seconds = run.train(method)
    beside = _choose_control(method, control, trainer, seconds)
    if beside is not None:
        _, results[beside], _ = run.train(beside)
    results[method] = own
    _save(run, trainer, method, results)
    _tell(run, trainer, method, beside, results)


@contextmanager
def _bars_of_datasets() -> Iterator[None]:
    """Shows the bar of a `map`, which may take minutes, where those of `datasets` are off."""
    were_off = datasets.are_progress_bars_disabled()
    datasets.enable_progress_bars()
    try:
        yield
    finally:
        if were_off:
            datasets.disable_progress_bars()


def _choose_control(method: str, control: str | None, trainer: FederatedTrainer, seconds: float) -> str | None:
    """The control that is run, after a word on one that is not."""
    if control == NO_CONTROL or method == (control or "fedavg"):
        return None
    fair = control or ("fedavg_tuned_at_end" if trainer.strategy.needs_reserved_set() else "fedavg")
    if control is None and fair == method:
        return None
    estimate = sum(report.seconds.get("clients", 0.0) for report in trainer.rounds) or seconds
    if control is None and estimate > CHEAP_SECONDS:
        print(f"\nNo control was run: --control {fair} would take about {estimate / 60:.0f} minutes more.")
        return None
    if control is None:
        print(f"\nA control of the same start and rounds, about {estimate:.0f} s (--control none leaves it out):")
    return fair


def _save(run: _Run, trainer: FederatedTrainer, method: str, results: dict[str, dict[str, float]]) -> None:
    """The model, its card, the pictures and the figures."""
    gate_share_KC = None
    if method == "fedmoe":
        gate_share_KC = analyse(trainer, run.data, run.args.eval_batch_size).share_KC
        plot_gate(gate_share_KC, run.data.label_names, run.folder / "gate.png")
    if trainer.client_table:
        plot_clients({method: trainer.client_table}, run.folder / "client_accuracies.png")
    (run.folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    trainer.save_model(str(run.folder / "model"))
    trainer.create_model_card(
        model_name=run.folder.resolve().name,
        dataset=run.experiment.data_name,
        folder=run.folder / "model",
        comparison={
            name: {metric: score[metric] for metric in METRICS if metric in score} for name, score in results.items()
        },
        gate_share_KC=gate_share_KC,
    )


def _tell(
    run: _Run, trainer: FederatedTrainer, method: str, beside: str | None, results: dict[str, dict[str, float]]
) -> None:
    assert run.data.test is not None
    count = len(run.data.test)
    print("\n" + result_table(results, f"On {count} test rows", beside))
    accuracy = results[method]["accuracy"]
    print(f"One seed and {count} test rows leave about ±{100 * margin(accuracy, count):.1f} points open.")
    served = {
        name: {metric: score[f"clients_{metric}"] for metric in METRICS[:2]}
        for name, score in results.items()
        if "clients_accuracy" in score
    }
    if served:
        print("\n" + result_table(served, "Each client's model on its own", beside))
    losses = [entry["loss"] for entry in trainer.state.log_history if "bytes_up" in entry]
    others = {name: score["accuracy"] for name, score in results.items() if name != method}
    for line in advise(
        RunBeside(method, accuracy, others, count, losses, run.data.num_labels),
        run.args,
        run.experiment.model_name,
    ):
        print(line)
    print(f"\nThe model and its card are in {run.folder / 'model'}, figures and pictures in {run.folder}.")


def result_table(results: dict[str, dict[str, float]], title: str, control: str | None = None) -> str:
    """Accuracy and macro-F1 in per cent, a line for each method."""
    named = {name: f"{name} (control)" if name == control else name.replace("_class", " class") for name in results}
    width = max(map(len, [title, *named.values()])) + 2
    lines = [f"{title:{width}s}{'accuracy':>10s}{'macro-F1':>10s}"]
    for name, score in results.items():
        lines.append(f"{named[name]:{width}s}{100 * score['accuracy']:10.1f}{100 * score['macro_f1']:10.1f}")
    return "\n".join(lines)


def _shown(model: str) -> str:
    """A folder by its last name: where it is on this machine is no matter."""
    return Path(model).name if Path(model).is_dir() else model
