"""Processes side by side: results, failures, and processes that die."""

import multiprocessing
import os
import signal
import sys

import pytest

from hf_fedmoe.experiments.side_by_side import SideBySide


def task(number: int) -> None:
    """Ends, refuses, fails, is killed, or tells who waits for it to stop as Control-C does, by its number."""
    if number == 1:
        raise ValueError("`number` is 1:\ngive another.")
    if number == 2:
        raise KeyError("two")
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 4:
        os.kill(os.getppid(), signal.SIGINT)
        signal.pause()


@pytest.fixture
def interruptible():
    """A shell starts what runs in its background with interrupts ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_what_fails_or_dies_is_told_of_its_own_task_alone_and_an_interrupt_stops_all(interruptible, monkeypatch):
    # In processes of the command `hf-fedmoe` the package alone imports no torch: they are there at once.
    monkeypatch.setattr(sys, "argv", ["hf-fedmoe"])
    failures, before = {}, len(multiprocessing.active_children())
    with pytest.raises(KeyboardInterrupt), SideBySide(1) as processes:
        failures |= processes.run(task, [0, 1, 2, 3])
        failures |= processes.run(task, [5])
        failures |= processes.run(task, [4])
    assert list(failures) == [0, 1, 2, 3, 5] and failures[0] is failures[5] is None
    assert failures[1].reason == "`number` is 1: give another." and failures[1].refused
    assert failures[2].reason == "KeyError: 'two'" and not failures[2].refused
    assert "Traceback" in failures[2].details
    assert failures[3].reason == "its process was ended by SIGKILL, is there enough memory?"
    assert len(multiprocessing.active_children()) == before
