"""
Runs tests and benchmarks on a GPU in the order of their worth, one after another until a budget of seconds is used up.
Each has its own limit, and a file of what it printed; a table at the end says how each ended.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from machine import print_table


HERE = Path(__file__).parent


@dataclass
class Job:
    """
    A command.

    Args:
        arguments (`list[str]`): Of Python.
        seconds (`int`): After which it is ended. Most of a short one's time are imports.
        quick (`list[str]`): In the place of `arguments` for `--quick`.
    """

    arguments: list[str]
    seconds: int
    quick: list[str]


def benchmark(name: str, options: str, seconds: int, quick: str = "--quick") -> Job:
    script = str(HERE / f"{name}.py")
    return Job([script, "--device", "cuda", *options.split()], seconds, [script, *quick.split()])


def comparison(out: str, seconds: int, rounds: int, rows: list[str], *options: str) -> Job:
    """Methods on CIFAR-10 in the paper's width; the table has the seconds of a round."""
    table = str(HERE.parent / "recipes" / "paper" / "table2_cifar10.yaml")
    command = ["-m", "hf_fedmoe.cli", "compare", table, "--seeds", "0", "--rows", *rows, "--out", f"runs/on_gpu/{out}"]
    command += ["--rehearse", "false", *options]
    return Job(
        [*command, "--size", "wide", "--rounds", str(rounds)], seconds, [*command, "--size", "tiny", "--rounds", "1"]
    )


def tests(path: str, processes: int, seconds: int, *quick: str) -> Job:
    """Tests of a file that need a GPU; for `--quick` they are listed, or others take their place."""
    command = ["-m", "pytest", "-q", "--tb=short", str(HERE.parent / "tests" / path)]
    return Job([*command, "-m", "gpu", "-n", str(processes)], seconds, [*command, *(quick or ("--co", "-m", "gpu"))])


FAIR = ["FedAvg", "Fed-MoE"]
FAIR += [
    f"FedAvg, {how}"
    for how in ("fine-tuned on the reserved set at the end", "server trains on the reserved set every round")
]
JOBS = {
    "tests": tests("training/test_on_gpu.py", 8, 150),
    "yelp": benchmark("yelp_round", "--zero 0 --models whole --threads 8", 70),
    "cifar": comparison("graphs", 90, 8, ["FedAvg"], "--eval_strategy", "no"),
    "cifar_plain": comparison("plain", 90, 8, ["FedAvg"], "--eval_strategy", "no", "--cuda_graphs", "false"),
    # A round of each recipe in the paper's size; two at once are 50 GB of a card at most.
    "presets": tests("recipes/test_paper_sizes.py", 2, 240, "-m", "slow", "-k", "yelp"),
    "peers": benchmark("peers", "--shapes cifar --launches 1 --rounds 10", 130, "--quick --shapes cifar"),
    "stage_b": benchmark("stage_b", "--sizes 124M --layers 12 --hidden 768", 60),
    "at_once": benchmark("clients_at_once", "--repetitions 1", 60),
    "yelp_lora": benchmark("yelp_round", "--zero 0 --models lora --threads 8", 70),
    "written_behind": benchmark("written_behind", "--megabytes 1400", 90),
    "round": benchmark("round", "", 60),
    "compiled": benchmark("compiled", "", 180),
    "lora_dispatch": benchmark("lora_dispatch", "", 120),
    "image_round": benchmark("image_round", "", 90),
    "channels_last": benchmark("channels_last", "", 60),
    "reading_ahead": benchmark("reading_ahead", "--workers 1 4", 120),
    "zero": benchmark("yelp_round", "--zero 0 1 2 3 --models whole --threads 8", 300),
    # By itself: `--jobs curve --budget 590`.
    "curve": comparison("curve", 590, 100, FAIR, "--jobs", "4"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--budget", type=int, default=600, help="Seconds for all; what is left bounds the last one.")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS), help="Which, in this order.")
    parser.add_argument("--out", type=Path, default=Path("runs/on_gpu"), help="Folder of what they print.")
    parser.add_argument("--quick", action="store_true", help="Small ones on a CPU: do they run at all?")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    end, rows = time.monotonic() + args.budget, []
    for name in args.jobs:
        job, left = JOBS[name], end - time.monotonic()
        if left < 5:
            rows.append([name, "", "not begun"])
            continue
        started = time.monotonic()
        with open(args.out / f"{name}.txt", "w", encoding="utf-8") as file:
            # With a group of its own: what it has started ends with it.
            process = subprocess.Popen(
                [sys.executable, *(job.quick if args.quick else job.arguments)],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
            try:
                code = process.wait(min(left, job.seconds))
                how = f"exit code {code}" if code else "done"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                how = "ended by its limit" if job.seconds < left else "ended by the budget"
        rows.append([name, f"{time.monotonic() - started:.0f}", how])
        print(*rows[-1], flush=True)  # if something ends this before the table
    print_table(f"What was run, outputs in {args.out}", ["", "seconds", ""], rows)


if __name__ == "__main__":
    main()
