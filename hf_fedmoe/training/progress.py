"""Lines and bars for the person who watches a run; trackers and `log_history` get the numbers themselves."""

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import CallbackHandler
from transformers.utils import logging

from ..data.counted import counted
from ..federation import RoundReport


T = TypeVar("T")

# What an evaluation logs of the clock.
CLOCKS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


# By what the entry of a round is known, whatever else is told of it.
ROUND = "seconds_server"


class RoundLines(TrainerCallback):
    """
    Writes one line for each round that is logged or evaluated, and one at the end of the run.

    Args:
        reports (`Callable`): Returns the reports of the rounds so far.
        client_name (`Callable`): From a client's number to what a line calls it.
    """

    def __init__(self, reports: Callable[[], list[RoundReport]], client_name: Callable[[int], str]):
        super().__init__()
        self._reports, self._client_name = reports, client_name
        # What was logged of a round whose line is still to be written.
        self._logs: list[dict[str, Any]] = []
        self._step = 0
        self._running = False

    def write(self, line: str) -> None:
        """Shows a line."""
        print(line, flush=True)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Rounds begin: what is logged from here on belongs to one."""
        self._running = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Gathers what is logged of a round until its evaluation, if there is one, is there."""
        if not state.is_world_process_zero or not logs:
            return
        if state.global_step != self._step or "train_runtime" in logs:
            self._write_round(args, state)
        prefix = prefix_of(logs)
        if "train_runtime" in logs:
            self._running = False
            return self.write(last_line(state.global_step, logs))
        if not self._running or not (prefix or "eval").startswith("eval"):
            return self.write(other_line(logs))
        self._logs.append(dict(logs))
        self._step = state.global_step
        # Evaluations of several data sets come one by one, each under a name of its own.
        if (ROUND in logs and not control.should_evaluate) or prefix == "eval":
            self._write_round(args, state)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Writes what is left of the round before."""
        self._write_round(args, state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Writes what is left of the round that was saved."""
        self._write_round(args, state)

    def _write_round(self, args: TrainingArguments, state: TrainerState) -> None:
        if not self._logs:
            return
        logs, self._logs = self._logs, []
        reports = self._reports()
        refused = reports[-1].refused if reports and any("refused_clients" in entry for entry in logs) else ()
        names = [self._client_name(client) for client in refused]
        chosen = (args.metric_for_best_model or "").removeprefix("eval_")
        self.write(round_line(self._step, state.max_steps, logs, names, ["accuracy", chosen]))


class RoundPrinter(RoundLines, PrinterCallback):
    """[`RoundLines`] where `disable_tqdm` asks for no bars."""


class RoundProgress(RoundLines, ProgressCallback):
    """[`RoundLines`] above a bar of the rounds."""

    def write(self, line: str) -> None:
        tqdm.write(line)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the bar, at the round from which a run is resumed."""
        super().on_train_begin(args, state, control, **kwargs)
        self.current_step = state.global_step
        if state.is_world_process_zero:
            bar: Any = tqdm(
                total=state.max_steps, initial=state.global_step, desc="Rounds", unit="round", dynamic_ncols=True
            )
            self.training_bar = bar  # transformers says that it is `None`

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Says nothing of an evaluation outside of a run, whose metrics the caller has."""
        if self.training_bar is not None:
            super().on_log(args, state, control, logs, **kwargs)


class Watch:
    """
    Shows the long loops of a server's step: a bar for each that takes more than a second, and a line too where asked.

    Args:
        args ([`~transformers.TrainingArguments`]): `disable_tqdm`.
        handler (`CallbackHandler`): Whose [`RoundLines`], if there are any, write.
        is_main (`bool`): Whether this is the process that shows anything.
    """

    seconds = 1.0

    def __init__(self, args: TrainingArguments, handler: CallbackHandler, is_main: bool):
        self._hidden = args.disable_tqdm or not is_main
        self._handler, self._is_main = handler, is_main
        self._telling = False

    def __call__(self, items: Collection[T], what: str) -> Iterator[T]:
        """The items of a loop that does `what`."""
        started = time.monotonic()
        yield from tqdm(items, what, leave=False, dynamic_ncols=True, delay=self.seconds, disable=self._hidden)
        seconds = time.monotonic() - started
        if self._telling and self._is_main and seconds >= self.seconds:
            for callback in self._handler.callbacks:
                if isinstance(callback, RoundLines):
                    callback.write(f"{what}  {seconds:.1f} s")

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Tells, in a block, each long loop in a line too, when it is through."""
        self._telling = True
        try:
            yield
        finally:
            self._telling = False

    def clients(self, count: int) -> tqdm:
        """A bar of the clients of a round."""
        return tqdm(total=count, desc="Clients", leave=False, dynamic_ncols=True, disable=self._hidden)


def one_line_a_round(
    handler: CallbackHandler, reports: Callable[[], list[RoundReport]], client_name: Callable[[int], str]
) -> None:
    """
    Exchanges the callback by which [`~transformers.Trainer`] shows progress, the last one that it adds, for ours. That
    of notebooks, which fills a table, stays, and so do a user's own.
    """
    own = {ProgressCallback: RoundProgress, PrinterCallback: RoundPrinter}
    if (default := type(handler.callbacks[-1])) in own:
        handler.callbacks[-1] = own[default](reports, client_name)


@contextmanager
def without_bars_of_files() -> Iterator[None]:
    """Keeps transformers, in a block, from showing a bar of its own for the files of every checkpoint."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def round_line(
    step: int, rounds: int, logs: Iterable[dict[str, Any]], refused: Collection[str], chosen: Collection[str]
) -> str:
    """
    A round in a line: `round  3/10  loss 1.234  accuracy 61.2 %  12.3 MB up  4.1 s  refused: client 7`.

    Args:
        step (`int`): Its number, from 1; 0 before the first one.
        rounds (`int`): Rounds of the run.
        logs (`Iterable[dict]`): What was logged of it: by the round, by evaluations, by callbacks of a user's own.
        refused (`Collection[str]`): The names of clients that were refused.
        chosen (`Collection[str]`): The metrics that are shown of an evaluation; its loss if it has none of them.
    """
    loss, scores, cost, others = [], [], [], []
    for entry in logs:
        prefix = prefix_of(entry)
        if ROUND in entry:
            loss = [f"{name} {entry[name]:.3f}" for name in ("loss", "epsilon") if name in entry]
            seconds = sum(value for name, value in entry.items() if name.startswith("seconds_"))
            cost = [f"{megabytes(entry['bytes_up'])} up"] if "bytes_up" in entry else []
            cost.append(f"{seconds:.1f} s")
        elif prefix is not None:
            scores += score_parts(prefix, entry, chosen)
        else:
            others += [number(name, value) for name, value in entry.items() if name != "epoch"]
    told = [f"refused: {', '.join(refused)}"] if refused else []
    return "  ".join([f"round {step:>{len(str(rounds))}}/{rounds}", *loss, *scores, *cost, *told, *others])


def score_parts(prefix: str, logs: dict[str, Any], chosen: Collection[str]) -> list[str]:
    """The chosen metrics of an evaluation, or its loss, with the name of its data set if that has one."""
    of_set = prefix.removeprefix("eval").lstrip("_")
    names = [name for name in dict.fromkeys(chosen) if f"{prefix}_{name}" in logs] or ["loss"]
    return [
        number(f"{of_set or 'eval'} loss" if name == "loss" else f"{of_set} {name}".strip(), logs[f"{prefix}_{name}"])
        for name in names
        if f"{prefix}_{name}" in logs
    ]


def last_line(rounds: int, logs: dict[str, Any]) -> str:
    """The end of a run in a line."""
    parts = [counted(rounds, "round"), f"{logs['train_runtime']:.1f} s"]
    if logs.get("train_samples_per_second") == 0:
        return "  ".join([*parts, "no round was left to train"])
    if "train_loss" in logs:  # a private run tells neither
        parts += [f"{logs.get('train_samples_per_second', 0.0):.4g} examples/s", f"loss {logs['train_loss']:.3f}"]
    return "  ".join(parts)


def other_line(logs: dict[str, Any]) -> str:
    """An evaluation by itself in a line, `test  loss 0.812  accuracy 61.2 %`, or whatever else was logged."""
    prefix = prefix_of(logs)
    begin = "" if prefix is None else f"{prefix}_"
    names = [name.removeprefix(begin) for name in logs if name.startswith(begin) and name != "epoch"]
    parts = [number(name, logs[begin + name]) for name in names if name not in CLOCKS]
    return "  ".join([prefix or "after the run", *parts])


def prefix_of(logs: dict[str, Any]) -> str | None:
    """Returns the beginning of the names of an evaluation's metrics, `None` where it is none."""
    return next((name.removesuffix("_runtime") for name in logs if name.endswith("_runtime")), None)


def number(name: str, value: Any) -> str:
    """A metric with its name; a share of right answers in per cent."""
    if isinstance(value, float) and name.endswith("accuracy") and 0 <= value <= 1:
        return f"{name} {100 * value:.1f} %"
    return f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}"


def megabytes(count: int) -> str:
    """Bytes as `12.3 MB`, or as `72.7 kB` where they are few."""
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
