"""
Two short rounds before a long run. They tell how long it will take, and how much memory and disk: the model, the
server's step, evaluations and checkpoints are the run's own, only the clients have fewer rows.
"""

import copy
import gc
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data import FederatedDataset, with_fewer_rows
from ..data.counted import counted
from ..federation import local_steps
from ..training import FederatedTrainer, FedMoETrainingArguments
from ..training.resuming import CLIENTS_FOLDER
from .amounts import size_in_words, time_in_words
from .classifier_experiment import ClassifierExperiment
from .methods import centralised, leave_as_it_is, make_trainer
from .named_strategies import CENTRALISED
from .process_memory import forget_peak, peak_bytes


# The first round warms up: kernels are chosen and graphs are captured in it.
ROUNDS = 2
# Of each client in such a round. A shape is captured as a CUDA graph when it has come twenty times.
STEPS = 20
FOLDER = "_rehearsal"
NO_ROOM = torch.OutOfMemoryError.__name__


@dataclass
class Forecast:
    """
    The time, memory and disk that a run will take, if it goes on like the second round of its rehearsal.

    Args:
        rounds (`int`): Of the run.
        clients (`float`), server (`float`), evaluation (`float`), checkpoint (`float`): Seconds of each in a round
            that has it; the server's with what it synchronises.
        evaluations (`int`), checkpoints (`int`): How many there are.
        last (`float`): Seconds after the last round: what the method does last, and tests.
        device_bytes (`int`, *optional*): Most memory on the GPU, `None` without one.
        process_bytes (`int`): Most memory of the process.
        disk_bytes (`int`), free_bytes (`int`): Most that the run will have on disk, and what is free.
    """

    rounds: int
    clients: float
    server: float
    evaluation: float
    checkpoint: float
    evaluations: int
    checkpoints: int
    last: float
    device_bytes: int | None
    process_bytes: int
    disk_bytes: int
    free_bytes: int

    @property
    def seconds(self) -> float:
        """All of the run."""
        rounds = self.rounds * (self.clients + self.server)
        return rounds + self.evaluations * self.evaluation + self.checkpoints * self.checkpoint + self.last

    def __str__(self) -> str:
        stages = f"clients {time_in_words(self.clients)}, server {time_in_words(self.server)}"
        times = [f"{counted(self.rounds, 'round')} of {time_in_words(self.clients + self.server)} ({stages})"]
        for count, what, seconds in (
            (self.evaluations, "evaluation", self.evaluation),
            (self.checkpoints, "checkpoint", self.checkpoint),
        ):
            if count:
                times.append(f"{counted(count, what)} of {time_in_words(seconds)}")
        sizes = [f"{size_in_words(self.process_bytes)} of memory", f"{size_in_words(self.disk_bytes)} on disk"]
        if self.device_bytes is not None:
            sizes.insert(0, f"{size_in_words(self.device_bytes)} on the GPU")
        line = f"about {time_in_words(self.seconds)}: {', '.join(times)}; {', '.join(sizes)}"
        if self.disk_bytes > self.free_bytes:
            line += f", of which {size_in_words(self.free_bytes)} are free: give another `output_dir`"
        return line


def rehearse(
    method: str,
    experiment: ClassifierExperiment,
    args: FedMoETrainingArguments,
    data: FederatedDataset,
    processor: Any,
) -> Forecast:
    """
    Runs two short rounds of a method in a folder of their own, which is gone afterwards. Local training is taken to be
    in proportion to its steps. What some methods train before the first round is not in the forecast, nor are tests of
    clients and of a mixture's experts after the last.

    Args:
        method (`str`), experiment ([`ClassifierExperiment`]), args ([`FedMoETrainingArguments`]), data, processor: As
            [`make_trainer`] takes them, which is called again for the run itself.

    Raises:
        ValueError: When the GPU has too little memory.
    """
    try:
        return _rehearsed(method, experiment, args, data, processor)
    except (RuntimeError, ValueError) as error:
        # A round tells of clients that have no room, and the trial of a model that has none.
        if not isinstance(error, torch.OutOfMemoryError) and NO_ROOM not in str(error):
            raise
        raise ValueError(
            f"{method!r} does not fit into the GPU's memory, before anything is trained: take fewer "
            '`num_routed_experts`, adapters (`peft` "lora"), a smaller `per_device_train_batch_size` or '
            f"`per_device_eval_batch_size`, or another model. It says: {' '.join(str(error).split())}"
        ) from error
    finally:
        gc.collect()  # a trainer is full of cycles, and the run needs its memory


def _rehearsed(
    method: str,
    experiment: ClassifierExperiment,
    args: FedMoETrainingArguments,
    data: FederatedDataset,
    processor: Any,
) -> Forecast:
    assert args.output_dir is not None  # `TrainingArguments` have one by now
    folder = Path(args.output_dir, FOLDER)
    short, few = _short_arguments(args, folder), with_fewer_rows(data, _rows(args))
    trainer = make_trainer(method, experiment, short, few, processor, train_first=leave_as_it_is)
    clock = _Clock()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(clock)
    on_gpu = trainer.accelerator.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    forget_peak()
    _remove(trainer, folder)
    try:
        trainer.train()
        device_bytes = torch.cuda.max_memory_allocated() if on_gpu else None
        report = trainer.rounds[-1]
        if crowded := [fault for round_ in trainer.rounds for fault in round_.refused.values() if NO_ROOM in fault]:
            raise torch.OutOfMemoryError(crowded[0])
        of_whole, of_short = steps_of_clients(method, args, data), steps_of_clients(method, short, few)
        ratio = len(report.clients) * fmean(of_whole) / sum(of_short[client] for client in report.clients)
        evaluations = times(args.eval_strategy, args.eval_steps, args.rounds, args.eval_delay) + args.eval_on_start
        saved = times(args.save_strategy, args.save_steps, args.rounds)
        checkpoints = evaluations if args.save_strategy == "best" else saved
        # Tests are read by the same model.
        tests = clock.evaluation * len(data.test or ()) / max(1, len(data.validation or ()))
        return Forecast(
            args.rounds,
            report.seconds["clients"] + (ratio - 1) * report.training_seconds,
            report.seconds["server"] + report.seconds["synchronise"],
            clock.evaluation,
            clock.checkpoint,
            evaluations,
            checkpoints,
            clock.last + tests,
            device_bytes,
            peak_bytes(),
            _bytes_on_disk(folder, args, len(of_whole), len(report.clients), checkpoints),
            shutil.disk_usage(next(each for each in folder.absolute().parents if each.exists())).free
            + _size_of(folder),
        )
    finally:
        _remove(trainer, folder)


def steps_of_clients(method: str, args: FedMoETrainingArguments, data: FederatedDataset) -> list[int]:
    """Counts the local steps of each client in a round. Trained alone, the reserved set is the only one."""
    if method in CENTRALISED:
        alone = centralised(args, data)
        args, data = alone["args"], alone["train_dataset"]
    return [len(local_steps(size, args, seed=0)) for size in data.client_sizes.tolist()]


def _rows(args: FedMoETrainingArguments) -> int:
    """Returns how many rows a client needs for the steps of a rehearsal, at least two in an epoch."""
    batch = args.train_batch_size * args.gradient_accumulation_steps
    return batch * max(2, round(STEPS / args.num_train_epochs))


def _short_arguments(args: FedMoETrainingArguments, folder: Path) -> FedMoETrainingArguments:
    short = copy.copy(args)
    changes: dict[str, Any] = {"output_dir": str(folder), "rounds": ROUNDS, "report_to": [], "push_to_hub": False}
    changes |= {"load_best_model_at_end": False, "eval_on_start": False, "eval_delay": 0, "disable_tqdm": True}
    # A round without a client would say nothing.
    if args.client_choice == "poisson":
        changes["client_choice"] = "uniform"
    # Of few rows a step takes a larger share, which would cost more privacy than there is.
    changes["privacy_accountant"] = "rdp"
    if args.is_private and args.noise_multiplier is None:
        changes["noise_multiplier"] = min(1.0, args.clients_per_round / 20)
    if args.hides_examples and args.example_noise_multiplier is None:
        changes["example_noise_multiplier"] = 1.0
    changes |= {"target_epsilon": None, "example_target_epsilon": None}
    # After each of the two rounds, if at all: the first one's warms up.
    if args.eval_strategy != "no":
        changes |= {"eval_strategy": "steps", "eval_steps": 1}
    if args.save_strategy != "no":
        changes |= {"save_strategy": "steps", "save_steps": 1}
    for name, value in changes.items():
        setattr(short, name, value)
    return short


def times(strategy: str, every: float | None, rounds: int, first: float = 0) -> int:
    """
    Counts the rounds after which something is done, the last one among them.

    Args:
        strategy (`str`): `"no"`, `"steps"`, or after each round.
        every (`float`, *optional*): Of `"steps"`: the interval, a share of all rounds if below 1.
        rounds (`int`): Of the run.
        first (`float`, *optional*, defaults to 0): Nothing is done before this round.
    """
    if strategy == "no":
        return 0
    interval: float = 1
    if strategy == "steps":
        interval = math.ceil(every * rounds) if every and every < 1 else every or rounds
    due = (index for index in range(1, rounds + 1) if index % interval == 0 or index == rounds)
    return sum(index >= first for index in due)


def _bytes_on_disk(
    folder: Path, args: FedMoETrainingArguments, num_clients: int, clients_of_round: int, checkpoints: int
) -> int:
    """
    Counts the most that a run will have on disk: its checkpoints, with one more before the oldest is deleted, and the
    files of clients that took part, with those that older checkpoints need.
    """
    of_clients = [path.stat().st_size for path in folder.glob(f"{CLIENTS_FOLDER}/*") if path.is_file()]
    of_client = fmean(of_clients) if of_clients else 0
    files = min(num_clients, clients_of_round * args.rounds)
    if not checkpoints:
        return round(of_client * files)
    kept = checkpoints
    if args.save_total_limit is not None and args.save_total_limit > 0:
        kept = max(args.save_total_limit, 2 if args.metric_for_best_model else 1)
    newest = max(folder.glob("checkpoint-*"), default=folder)  # another machine's processes have no checkpoint
    if not args.save_only_model:
        since = min(num_clients, clients_of_round * math.ceil(args.rounds / checkpoints))
        files = min(files + min(kept, checkpoints - 1) * since, clients_of_round * args.rounds)
    return round(min(kept + 1, checkpoints) * _size_of(newest) + of_client * files)


def _size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _remove(trainer: FederatedTrainer, folder: Path) -> None:
    """Removes the folder of a rehearsal, by the main process."""
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        shutil.rmtree(folder, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()


class _Clock(TrainerCallback):
    """Takes the seconds of the last evaluation, of the last checkpoint and of what is behind the last round."""

    def __init__(self) -> None:
        super().__init__()
        self.evaluation = self.checkpoint = self.last = 0.0
        self._before = time.monotonic()

    def _lap(self) -> float:
        before, self._before = self._before, time.monotonic()
        return self._before - before

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Ends a round, whether it is logged or not."""
        self._lap()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends an evaluation."""
        self.evaluation = self._lap()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Ends a checkpoint."""
        self.checkpoint = self._lap()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Ends what the method does last."""
        self.last = self._lap()
