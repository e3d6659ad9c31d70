"""One run of a comparison: a method on a seed, in a folder of its own."""

import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import PrinterCallback
from transformers.utils import logging

from ..federation import write_json
from ..reporting import RunResult
from ..training import FedMoETrainingArguments
from .classifier_experiment import ClassifierExperiment
from .comparison import KINDS
from .experiment import Experiment
from .library_warnings import without_library_warnings
from .methods import train_or_go_on
from .named_strategies import source_of
from .noted_rounds import NOTE, NotesRounds
from .rehearsal import rehearse
from .settings import parse_settings, settings_of, typed


FORECAST = "forecast.json"
# Settings that change nothing about the results of a run.
NO_MATTER = ("rehearse",)


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
        experiment, args = parse_settings(KINDS[self.kind].experiment_class, settings)
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
    def trains(self) -> bool:
        """Tells whether the method trains anything."""
        return self.method != KINDS[self.kind].untrained

    @property
    def result_file(self) -> Path:
        return self.folder / "result.json"

    def stored(self) -> dict[str, Any] | None:
        """
        Reads what the run has left when it has ended; `None` before that.

        Raises:
            `ValueError`: When it had other settings, or its file is damaged.
        """
        found = self._read()
        if found is not None and (changed := self._changed(found)):
            raise ValueError(
                f"{str(self.folder)!r} has a finished run with another {', '.join(changed)}: choose another `--out`, "
                "or delete that folder."
            )
        return found

    def changed(self) -> list[str]:
        """Lists the settings in which a finished run differs from this one."""
        found = self._read()
        return [] if found is None else self._changed(found)

    def _read(self) -> dict[str, Any] | None:
        if not self.result_file.is_file():
            return None
        try:
            found = json.loads(self.result_file.read_text())
            self._changed(found)
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{str(self.result_file)!r} is damaged: delete it, and the run starts anew.") from None
        return found

    def _changed(self, found: dict[str, Any]) -> list[str]:
        theirs, ours = _canonical(self.kind, found["settings"]), _canonical(self.kind, self.identity)
        differing = {name for name in theirs | ours if theirs.get(name) != ours.get(name)}
        return sorted(differing - {*NO_MATTER})

    def result(self) -> RunResult | None:
        """The figures of the run when it has ended."""
        found = self.stored()
        if found is None:
            return None
        return RunResult(self.seed, found["metrics"], [(step, value) for step, value in found["curve"]])


def _canonical(kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without regard to how they were written: `1e-3` may be a text, a configuration JSON."""
    known = settings_of(KINDS[kind].experiment_class, FedMoETrainingArguments)
    return {name: typed(name, value, known[name]) if name in known else value for name, value in settings.items()}


@without_library_warnings(notes=False)  # `try_out` has told them, of all runs
def execute(run: Run) -> None:
    """Trains and tests one method on one seed, and leaves `result.json` in its folder."""
    _be_quiet(run.threads)
    kind = KINDS[run.kind]
    experiment, args = run.parse()
    processor = experiment.load_processor()
    _, data = experiment.load_data(processor, run.seed)
    if run.trains:
        trainer = kind.make_trainer(run.method, experiment, args, data, processor)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(NotesRounds(run.folder))
        train_or_go_on(trainer)
        metrics = kind.measure(run.method, trainer, experiment, data, processor)
        curve = kind.curve(trainer, processor)
    else:
        metrics, curve = kind.measure_untrained(experiment, data, processor), []
    run.folder.mkdir(parents=True, exist_ok=True)
    write_json(run.result_file, {"metrics": metrics, "curve": curve, "settings": run.identity})
    (run.folder / NOTE).unlink(missing_ok=True)
    for leftover in ("checkpoint-*", "_clients"):
        for folder in run.folder.glob(leftover):
            shutil.rmtree(folder)


@without_library_warnings()
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
                if run.row not in tried and run.trains:
                    KINDS[run.kind].try_trainer(run.method, experiment, args, data, processor)
                tried.add(run.row)
            except (ValueError, OSError, ImportError) as error:
                raise ValueError(f"{run}: {' '.join(str(error).split())}") from error


@without_library_warnings(notes=False)
def rehearse_run(run: Run) -> None:
    """Rehearses a run of classifiers in its folder, and leaves the forecast there."""
    _be_quiet(run.threads)
    experiment, args = run.parse()
    assert isinstance(experiment, ClassifierExperiment)  # which has the setting that asks for this
    processor = experiment.load_processor()
    _, data = experiment.load_data(processor, run.seed)
    forecast = rehearse(run.method, experiment, args, data, processor)
    write_json(run.folder / FORECAST, {"seconds": forecast.seconds, "told": str(forecast)})


def _be_quiet(threads: int) -> None:
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
