"""A process that sees no GPU: transformers' device is that of a whole process, which cannot train on two."""

import atexit
import functools
import importlib
import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any
from unittest import mock


def on_the_cpu(function: Callable, *args: Any, **kwargs: Any) -> Future:
    """
    Calls a function at the top of a module in the process of this one's that has no GPU, after those asked for before.
    What it is given and returns is pickled: numbers and lists, not tensors, whose memory would be shared.
    """
    return _executor(function.__module__).submit(function, *args, **kwargs)


def both(run: Callable, folder: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """
    Returns what `run(folder, use_cpu, ...)` does in this process, on its GPU, and in the other meanwhile, on the CPU.
    Each has a folder of its own.
    """
    expected = on_the_cpu(run, folder / "cpu", True, *args, **kwargs)
    found = run(folder / "gpu", False, *args, **kwargs)
    return found, expected.result()


@functools.cache
def _executor(module: str) -> ProcessPoolExecutor:
    """One process for all tests, which imports what it needs once; `module` is the first thing that it imports."""
    # Not a fork, which would inherit what this process knows of its GPU.
    executor = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _prepare, (module,))
    atexit.register(executor.shutdown, wait=False, cancel_futures=True)
    # The first task starts the process, which has these variables before anything is imported there.
    with mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}):
        executor.submit(os.getpid)
    return executor


def _prepare(module: str) -> None:
    threading.Thread(target=_end_with_the_tests, daemon=True).start()
    importlib.import_module(module)
    torch = importlib.import_module("torch")
    assert not torch.cuda.is_available()
    torch.set_num_threads(1)  # models are tiny, and there is a process beside each of the tests


def _end_with_the_tests() -> None:
    """Ends this process when that of the tests was killed: it would wait for tasks for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)
