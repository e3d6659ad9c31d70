"""Cores of a recipe that `accelerate launch` started."""

import os
from pathlib import Path

import psutil
import torch
from accelerate import PartialState


# On Linux, of a container that may use so much time of cores in a while: `docker run --cpus 2`. Of control groups of
# version 2 in one file, of version 1 in two.
GROUPS = Path("/sys/fs/cgroup")
QUOTAS = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))


def use_all_cores() -> None:
    """
    Gives the only process on a CPU all cores where `accelerate launch` left it one thread, its default unless
    `--num_cpu_threads_per_process` or `OMP_NUM_THREADS` say more.
    """
    launched = "ACCELERATE_DYNAMO_BACKEND" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if launched and PartialState().num_processes == 1 and PartialState().device.type == "cpu":
        torch.set_num_threads(min([psutil.cpu_count(logical=False) or 1, *_limits()]))


def _limits() -> list[int]:
    """Lists limits to the cores, which `taskset` or a container sets: threads beyond them take many times as long."""
    found = [len(os.sched_getaffinity(0))] if hasattr(os, "sched_getaffinity") else []  # on Linux
    for files in QUOTAS:
        try:
            time, period = (int(number) for file in files for number in (GROUPS / file).read_text().split())
        except (OSError, ValueError):  # there is none, or it is "max"
            continue
        if time > 0 and period > 0:  # -1 is none
            found.append(max(1, time // period))
    return found
