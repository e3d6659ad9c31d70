"""Cores of a recipe that `accelerate launch` started."""

import os

import psutil
import torch
from accelerate import PartialState


def use_all_cores() -> None:
    """
    Gives the only process on a CPU all cores where `accelerate launch` left it one thread, its default unless
    `--num_cpu_threads_per_process` or `OMP_NUM_THREADS` say more.
    """
    launched = "ACCELERATE_DYNAMO_BACKEND" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if launched and PartialState().num_processes == 1 and PartialState().device.type == "cpu":
        cores = psutil.cpu_count(logical=False) or 1
        if hasattr(os, "sched_getaffinity"):  # on Linux: a container or `taskset` may allow fewer
            cores = min(cores, len(os.sched_getaffinity(0)))
        torch.set_num_threads(cores)
