"""
One federated round of the same work in several frameworks: a bare PyTorch loop, hf_fedmoe, Apple's pfl and Flower.

Each contestant is a process of its own with one thread (`peer_*.py`), which waits before each round until it is its
turn, so that rounds alternate (A B C D A B ...). Seconds are taken from outside, by wall clock and as processor time
of the contestant's process and all its children. Clients, their participation, the order of examples, start weights,
seeds of dropout and optimizers are equal (`peer_work.py`); how far the weights agree is printed. Contestants whose
packages are not installed, and those that are not for a device or a shape, are named and left out; so is one that
fails, with the end of its log, while the others go on.
"""

import argparse
import importlib.util
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import torch
from machine import add_device, device_name, print_table, ratios, spread
from peer_work import MODELS
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_fedmoe.data import decode_images, load_source
from hf_fedmoe.data.sources import DATA_FOLDER_VARIABLE
from hf_fedmoe.federation import CLIENT_CHOICES, Stream, seed_of
from hf_fedmoe.federation.local_training import local_steps
from hf_fedmoe.models import SmallImageProcessor
from hf_fedmoe.training import FederatedTrainingArguments


@dataclass(frozen=True)
class Shape:
    clients: int
    participants: int
    examples: int
    batch_size: int


SHAPES = {
    "cifar": Shape(clients=400, participants=50, examples=50, batch_size=10),
    "lora": Shape(clients=8, participants=8, examples=32, batch_size=8),
}
QUICK = {
    "cifar": Shape(clients=8, participants=4, examples=20, batch_size=10),
    "lora": Shape(clients=2, participants=2, examples=16, batch_size=8),
}


@dataclass(frozen=True)
class Peer:
    module: str
    packages: tuple[str, ...] = ()
    shapes: tuple[str, ...] = tuple(SHAPES)
    not_on: dict[str, str] = field(default_factory=dict)  # why not on a device

    def missing(self, device: str) -> str | None:
        """Says why it cannot take part."""
        if device in self.not_on:
            return self.not_on[device]
        absent = [package for package in self.packages if importlib.util.find_spec(package) is None]
        return f"{', '.join(absent)} is not installed" if absent else None


CONTESTANTS = {
    "bare": Peer("peer_bare"),
    "ours": Peer("peer_ours"),
    "ours_at_once": Peer("peer_ours", shapes=("cifar",)),
    "pfl": Peer("peer_pfl", packages=("pfl",)),
    "flower": Peer("peer_flower", ("flwr", "ray"), not_on={"cuda": "here its actor is one of a CPU alone"}),
}
BY_DEFAULT = {"cpu": [name for name in CONTESTANTS if name != "ours_at_once"], "cuda": list(CONTESTANTS)}
WARM_UP = 2  # rounds that do not count
ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    **dict.fromkeys(("FLWR_TELEMETRY_ENABLED", "RAY_USAGE_STATS_ENABLED"), "0"),
    **dict.fromkeys(("HF_HUB_OFFLINE", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"), "1"),
}
# The C library gives freed pages back and asks for new ones as chance has placed them, for up to a fifth of a round.
KEEP_PAGES = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "4294967296"}


def images(count: int) -> dict[str, Tensor]:
    """CIFAR-10 where there is a folder of data, else noise."""
    if DATA_FOLDER_VARIABLE not in os.environ:
        print(f"{DATA_FOLDER_VARIABLE} is not set: random images in the place of CIFAR-10")
        return {
            "pixel_values": torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8),
            "labels": torch.randint(10, (count,)),
        }
    rows = load_source("cifar10")["train"].shuffle(seed=0).select(range(count))
    decode = partial(decode_images, image_processor=SmallImageProcessor(num_channels=3, size=32))
    rows = rows.map(decode, batched=True, remove_columns=["image"], keep_in_memory=True)
    pixels = np.frombuffer(b"".join(rows["pixel_values"]), dtype=np.uint8).reshape(-1, 3, 32, 32)
    return {"pixel_values": torch.tensor(pixels), "labels": torch.tensor(rows["label"])}


def write_work(folder: Path, name: str, shape: Shape, rounds: int, channels_last: bool, device: str) -> None:
    """Data, start weights and plan, whose draws are those of `FederatedTrainer` with seed 42."""
    torch.manual_seed(0)
    count = shape.clients * shape.examples
    if name == "cifar":
        data = images(count)
    else:
        data = {"input_ids": torch.randint(1, 2000, (count, 64)), "labels": torch.randint(4, (count,))}
    save_file(data, folder / "data.safetensors")
    save_file({k: t.contiguous() for k, t in MODELS[name]().state_dict().items()}, folder / "start.safetensors")
    args = FederatedTrainingArguments(str(folder), per_device_train_batch_size=shape.batch_size, use_cpu=True)
    clients, seeds, orders = [], [], []
    for round_index in range(rounds):
        rng = np.random.default_rng(seed_of(args.seed, Stream.CLIENT_DRAW, round_index))
        chosen = CLIENT_CHOICES[args.client_choice](shape.clients, shape.participants, rng)
        clients.append(chosen)
        seeds.append([seed_of(args.seed, Stream.LOCAL_TRAINING, round_index, client) for client in chosen])
        plans = [local_steps(shape.examples, args, seed) for seed in seeds[-1]]
        orders.append([[row for step in plan for batch in step for row in batch] for plan in plans])
    plan = {"clients": clients, "seeds": seeds, "orders": orders}
    save_file({key: torch.tensor(values) for key, values in plan.items()}, folder / "plan.safetensors")
    settings = {"shape": name, "batch_size": shape.batch_size, "channels_last": channels_last, "device": device}
    (folder / "settings.json").write_text(json.dumps(settings))


@dataclass
class Seconds:
    wall: float
    cpu: float


@dataclass
class Result:
    """Measurements of a contestant, a list entry for each launch; of `rounds` one for each round that counts."""

    start_up: list[Seconds] = field(default_factory=list)
    first_round: list[Seconds] = field(default_factory=list)
    rounds: list[Seconds] = field(default_factory=list)
    whole: list[Seconds] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    processes: int = 0
    first_gap: float = 0.0
    last_gap: float = 0.0


class Contestant:
    """A contestant's process, and those that it starts."""

    def __init__(self, name: str, folder: Path, environment: dict[str, str]):
        self.name, self.folder = name, folder
        self.memory, self.seen = 0, set()
        started = time.perf_counter()
        # Not as a script: Ray hands over by name what it can import, and piecemeal, in every call, what it cannot.
        module = CONTESTANTS[name].module
        command = [sys.executable, "-c", f"from {module} import main; main()", str(folder), name]
        here = Path(__file__).parent
        paths = os.pathsep.join([str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        with open(folder / f"{name}.log", "w") as log:
            self.process = psutil.Popen(
                command,
                cwd=here,
                env=os.environ | environment | {"PYTHONPATH": paths},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,
            )
        self._await_ready(watch_memory=True)
        self.spent = [Seconds(time.perf_counter() - started, self._cpu_seconds())]

    def run_round(self, watch_memory: bool) -> Seconds:
        used = self._cpu_seconds()  # takes milliseconds where there are many processes
        started = time.perf_counter()
        self.process.stdin.write(b"go\n")
        self._await_ready(watch_memory)
        self.spent.append(Seconds(time.perf_counter() - started, self._cpu_seconds() - used))
        self._look_at_memory()
        return self.spent[-1]

    def finish(self) -> None:
        """Lets it end, and ends what it leaves running."""
        self.process.stdin.write(b"go\n")
        self.process.wait(120)
        self.end()

    def weights(self, rounds: int) -> dict[str, Tensor]:
        return load_file(self.folder / f"{self.name}-{rounds}.safetensors")

    def end(self) -> None:
        left = [process for process in {self.process, *self.seen} if process.is_running()]
        for process in left:
            process.terminate()
        _, alive = psutil.wait_procs(left, timeout=10)
        for process in alive:
            process.kill()
        self.process.wait()

    def _await_ready(self, watch_memory: bool) -> None:
        while not select.select([self.process.stdout], [], [], 0.25)[0]:
            if watch_memory:
                self._look_at_memory()
        if self.process.stdout.readline() != b"ready\n":
            self.end()
            tail = "\n".join((self.folder / f"{self.name}.log").read_text().splitlines()[-20:])
            raise RuntimeError(f"The contestant {self.name!r} has ended early:\n{tail}")

    def _tree(self) -> list[psutil.Process]:
        tree = [self.process, *self.process.children(recursive=True)]
        self.seen |= set(tree[1:])
        return tree

    def _cpu_seconds(self) -> float:
        total = 0.0
        for process in self._tree():
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:  # its parent counts it from now on
                continue
            total += times.user + times.system + times.children_user + times.children_system
        return total

    def _look_at_memory(self) -> None:
        """Proportional set size, in which memory that processes share counts once, where the system tells it."""
        total = 0
        for process in self._tree():
            try:
                found = process.memory_full_info()
            except psutil.NoSuchProcess:
                continue
            total += getattr(found, "pss", found.rss)
        self.memory = max(self.memory, total)


def launch(folder: Path, rounds: int, results: dict[str, Result], environment: dict[str, str]) -> None:
    """Starts all contestants and lets them run their rounds in turns; the results of one that fails are taken out."""
    running: dict[str, Contestant] = {}

    def attempt(name: str, act: Callable[[], Any]) -> Any:
        """Returns what `act` does, or `None` if the contestant fails."""
        try:
            return act()
        except (RuntimeError, OSError, psutil.Error) as error:
            print(f"Without {name} from here on: {error}", flush=True)
            del results[name]
            if name in running:
                running.pop(name).end()
            return None

    try:
        for name in list(results):
            contestant = attempt(name, partial(Contestant, name, folder, environment))
            if contestant is not None:
                running[name] = contestant
        for round_index in range(rounds):
            watch_memory = round_index < WARM_UP
            taken = {name: attempt(name, partial(c.run_round, watch_memory)) for name, c in list(running.items())}
            taken = {name: seconds for name, seconds in taken.items() if seconds is not None}
            numbers = [f"{name} {seconds.cpu:.2f}/{seconds.wall:.2f}" for name, seconds in taken.items()]
            print(f"round {round_index + 1}, s of cpu/wall:", ", ".join(numbers), flush=True)
            for name, seconds in taken.items():
                if round_index == 0:
                    results[name].first_round.append(seconds)
                elif round_index >= WARM_UP:
                    results[name].rounds.append(seconds)
        for name, contestant in list(running.items()):
            attempt(name, contestant.finish)
    finally:
        for contestant in running.values():
            contestant.end()
    for name, contestant in running.items():
        result, spent = results[name], contestant.spent
        result.start_up.append(spent[0])
        result.whole.append(Seconds(sum(s.wall for s in spent), sum(s.cpu for s in spent)))
        result.memory.append(contestant.memory / 2**20)
        result.processes = max(result.processes, 1 + len(contestant.seen))
        reference = next(iter(running.values()))
        result.first_gap = max(result.first_gap, largest_gap(contestant.weights(1), reference.weights(1)))
        result.last_gap = max(result.last_gap, largest_gap(contestant.weights(rounds), reference.weights(rounds)))


def largest_gap(weights: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    return max((weights[name] - tensor).abs().max().item() for name, tensor in others.items())


def print_results(title: str, results: dict[str, Result], rounds: int, device: str) -> None:
    clocks = ("cpu", "wall")
    compared = clocks if device == "cpu" else ("wall",)  # a processor that waits for a GPU takes its time, too
    seconds = {name: {c: [vars(s)[c] for s in result.rounds] for c in clocks} for name, result in results.items()}
    references = [name for name in ("bare", "ours") if name in results]
    header = ["", *(f"{clock}, s" for clock in clocks)]
    header += [f"{clock} / {reference}" for reference in references for clock in compared]
    rows = [
        [name, *(spread(of[clock]) for clock in clocks)]
        + [spread(ratios(of[clock], seconds[reference][clock])) for reference in references for clock in compared]
        for name, of in seconds.items()
    ]
    print_table(f"{title}: a round", header, rows)

    def both(values: list[Seconds]) -> str:
        return " / ".join(f"{statistics.median(vars(s)[clock] for s in values):.1f}" for clock in clocks)

    header = ["median, s of cpu / wall", "start-up", "first round", f"start-up and {rounds} rounds"]
    header += ["peak memory, MB", "processes", "difference after one round", "after all"]
    rows = []
    for name, result in results.items():
        times = [both(values) for values in (result.start_up, result.first_round, result.whole)]
        gaps = [f"{gap:.0e}" for gap in (result.first_gap, result.last_gap)]
        rows.append([name, *times, spread(result.memory, 1, 0), str(result.processes), *gaps])
    print_table(f"{title}: a run", header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="A federated round in several frameworks.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="Which to measure.")
    parser.add_argument(
        "--contestants",
        nargs="+",
        choices=CONTESTANTS,
        help="In turns; all if left out, but for `ours_at_once` on a CPU.",
    )
    add_device(parser)
    parser.add_argument("--launches", type=int, default=3, help="How often all contestants are started anew.")
    parser.add_argument("--rounds", type=int, default=5, help=f"Per launch, after {WARM_UP} that do not count.")
    parser.add_argument(
        "--malloc", choices=("keep", "default"), default="keep", help="Whether the C library keeps freed pages."
    )
    parser.add_argument(
        "--channels_last",
        action="store_true",
        help="All have images with channels last in memory, as `ImageCollator` makes them.",
    )
    parser.add_argument("--quick", action="store_true", help="Small sizes and few rounds: does it run at all?")
    args = parser.parse_args()
    if args.quick:
        args.launches, args.rounds = 1, 2
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    print(f"PyTorch {torch.__version__}, {device_name(args.device)}, 1 thread")
    environment = ENVIRONMENT | (KEEP_PAGES if args.malloc == "keep" else {}) | {"PFL_PYTORCH_DEVICE": args.device}
    names, failed = [], set()
    for name in args.contestants or BY_DEFAULT[args.device]:
        missing = CONTESTANTS[name].missing(args.device)
        if missing:
            print(f"Without {name}: {missing}")
        else:
            names.append(name)
    for name in args.shapes:
        shape = (QUICK if args.quick else SHAPES)[name]
        results = {}
        for contestant in names:
            if name in CONTESTANTS[contestant].shapes:
                results[contestant] = Result()
            else:
                print(f"{name} without {contestant}: it is for {', '.join(CONTESTANTS[contestant].shapes)} only")
        started = set(results)
        with tempfile.TemporaryDirectory() as folder:
            write_work(Path(folder), name, shape, WARM_UP + args.rounds, args.channels_last, args.device)
            for _ in range(args.launches):
                launch(Path(folder), WARM_UP + args.rounds, results, environment)
        failed |= started - set(results)
        title = f"{name}, {shape.participants} of {shape.clients} clients, {shape.examples} examples each"
        print_results(f"{title}, batches of {shape.batch_size}", results, WARM_UP + args.rounds, args.device)
    if failed:
        raise SystemExit(f"What failed, see above: {', '.join(sorted(failed))}")


if __name__ == "__main__":
    main()
