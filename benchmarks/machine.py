"""Shared by benchmarks: threads, devices, alternating repetitions, launches, copy bandwidth, stages, tables."""

import argparse
import functools
import os
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch


def benchmark_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the arguments that all benchmarks take."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--threads", type=int, default=1, help="Threads of PyTorch; the ratios depend on them.")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="`cpu` on a busy machine, for one thread.",
    )
    parser.add_argument("--quick", action="store_true", help="Small sizes and few repetitions: does it run at all?")
    return parser


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of benchmarks that can run on a GPU."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="Where models are.")


def pin_threads(args: argparse.Namespace, device: str = "cpu") -> Callable[[], float]:
    """Fixes the number of threads, prints the machine in words and returns the clock to measure with."""
    if args.clock == "cpu" and args.threads > 1:
        raise ValueError(f"`--clock cpu` adds up the time of {args.threads} threads: take `--clock wall`.")
    if args.clock == "cpu" and device != "cpu":
        raise ValueError(f"`--clock cpu` does not see what `--device {device}` does: take `--clock wall`.")
    torch.set_num_threads(args.threads)
    print(f"PyTorch {torch.__version__}, {device_name(device)}, {args.threads} thread(s), {args.clock} clock")
    if device != "cpu":
        return synchronised
    return time.process_time if args.clock == "cpu" else time.perf_counter


def device_name(device: str) -> str:
    return torch.backends.cpu.get_cpu_capability() if device == "cpu" else torch.cuda.get_device_name()


def synchronised() -> float:
    """The time when the GPU has done all that it was asked for."""
    torch.cuda.synchronize()
    return time.perf_counter()


def alternate(
    candidates: dict[str, Callable[[], object]], repetitions: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """
    Seconds of each candidate, run in turns (A B A B ...) after one turn that does not count.

    On a shared machine two measurements can only be compared when they were taken side by side.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for repetition in range(repetitions + 1):
        for name, candidate in candidates.items():
            started = clock()
            candidate()
            if repetition:
                seconds[name].append(clock() - started)
    return seconds


def ratios(numerator: list[float], denominator: list[float]) -> list[float]:
    """Turn by turn."""
    return [a / b for a, b in zip(numerator, denominator, strict=True)]


def launch(arguments: list[str], count: int, grouped: bool) -> list[subprocess.CompletedProcess[str]]:
    """Runs `count` processes of a Python script to their ends; `grouped`, they know of each other as by `torchrun`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
    group |= {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}

    def run(index: int) -> subprocess.CompletedProcess[str]:
        own = group | {"RANK": index, "LOCAL_RANK": index} if grouped else {}
        variables = os.environ | {name: str(value) for name, value in own.items()}
        command = [sys.executable, *arguments]
        return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def copy_candidate(num_bytes: int, device: str = "cpu") -> tuple[Callable[[], object], int]:
    """A large `copy_` (the roof of everything that only moves memory) and the bytes it reads and writes."""
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source).fill_(0)
    return lambda: target.copy_(source), 2 * source.nbytes


def spread(values: list[float], unit: float = 1.0, digits: int = 2) -> str:
    """Median (smallest to largest)."""
    low, middle, high = (f"{f(values) * unit:.{digits}f}" for f in (min, statistics.median, max))
    return f"{middle} ({low} to {high})"


class StageClock:
    """
    Sums up the seconds of every stage while it is entered, by wrapping functions; `rest` is outside of all of them.

    Args:
        stages (`list[tuple]`): (owner of a function, its name, its stage). Of nested functions the innermost counts.
        clock (`Callable`): Gives the seconds.
    """

    def __init__(self, stages: list[tuple[Any, str, str]], clock: Callable[[], float]):
        self.stages, self.clock, self.seconds, self.stage = stages, clock, Counter(), "rest"

    def _go_to(self, stage: str) -> str:
        """Returns the stage that is left."""
        now, left = self.clock(), self.stage
        self.seconds[left] += now - self.since
        self.stage, self.since = stage, now
        return left

    def _timed(self, function: Callable, stage: str) -> Callable:
        @functools.wraps(function)  # keeps PyTorch's marks on functions that it has wrapped itself
        def timed(*args: Any, **kwargs: Any) -> Any:
            left = self._go_to(stage)
            try:
                return function(*args, **kwargs)
            finally:
                self._go_to(left)

        return timed

    def __enter__(self) -> None:
        self.stack, self.since = ExitStack(), self.clock()
        for owner, name, stage in self.stages:
            self.stack.enter_context(patch.object(owner, name, self._timed(vars(owner)[name], stage)))

    def __exit__(self, *error: Any) -> None:
        self.stack.close()
        self._go_to("rest")


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """A Markdown table, so that a figure can go from the terminal into a README as it is."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    print(f"\n{title}\n")
    for line in lines:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")
