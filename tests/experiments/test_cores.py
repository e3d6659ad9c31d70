"""Threads of a process that `accelerate launch` started."""

import os
from types import SimpleNamespace

import psutil
import pytest
import torch

from hf_fedmoe.experiments import cores


@pytest.mark.parametrize(
    ("threads", "launched", "allowed", "quota", "expected"),
    [
        *(("1", True, 4, "max 100000", [4]), ("1", True, 64, None, [8]), ("3", True, 4, None, [])),
        *(("1", False, 4, None, []), (None, True, 4, None, [])),
        # A container's share of time: two cores and a half, and less than one.
        *(("1", True, 64, "250000 100000", [2]), ("1", True, 64, "30000 100000", [1])),
        # Of control groups of version 1; what makes no sense is no limit.
        *(("1", True, 64, ("350000", "100000"), [3]), ("1", True, 64, ("-1", "100000"), [8])),
        *(("1", True, 64, "100000 0", [8]), ("1", True, 64, "many", [8]), ("1", True, 64, "", [8])),
    ],
)
def test_the_only_process_that_accelerate_launches_takes_all_cores(
    threads, launched, allowed, quota, expected, monkeypatch, tmp_path
):
    """A number of threads that somebody chose is kept."""
    counts = []
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 16 if logical else 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(allowed)), raising=False)
    for name, value in (("OMP_NUM_THREADS", threads), ("ACCELERATE_DYNAMO_BACKEND", "NO" if launched else None)):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    monkeypatch.setattr(cores, "GROUPS", tmp_path)
    (tmp_path / "cpu").mkdir()
    if isinstance(quota, tuple):
        for name, number in zip(("quota", "period"), quota, strict=True):
            (tmp_path / f"cpu/cpu.cfs_{name}_us").write_text(f"{number}\n")
    elif quota is not None:
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
    cores.use_all_cores()
    assert counts == expected


@pytest.mark.parametrize(("processes", "device"), [(2, "cpu"), (1, "cuda")])
def test_several_processes_share_the_cores_and_a_gpu_needs_none(processes, device, monkeypatch):
    counts, state = [], SimpleNamespace(num_processes=processes, device=torch.device(device))
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    monkeypatch.setattr("hf_fedmoe.experiments.cores.PartialState", lambda: state)
    for name, value in (("OMP_NUM_THREADS", "1"), ("ACCELERATE_DYNAMO_BACKEND", "NO")):
        monkeypatch.setenv(name, value)
    cores.use_all_cores()
    assert counts == []
