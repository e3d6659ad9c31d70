"""A stand-in for CUDA graphs that does the work anew, so that a CPU can tell whether what is captured is right."""

from typing import ClassVar

import pytest

from hf_fedmoe.federation import captured_passes, cuda_graph, local_updates


TIMES_SEEN = 3


class EagerGraph:
    """Does the work when it is replayed."""

    made: ClassVar[list["EagerGraph"]] = []

    def __init__(self, work, pool):
        self.work, self.replays = work, 0
        self.made.append(self)
        for _ in range(3):
            work()

    def replay(self):
        self.replays += 1
        self.work()


class IdleGraph(EagerGraph):
    """Does nothing when it is replayed."""

    def replay(self):
        pass


def refused_graph(work, pool):
    """Fails as PyTorch does where something waits for the device."""
    work()
    raise RuntimeError("operation not permitted when stream is capturing")


def capture_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has passes and steps captured when they come for the third time: tests are short."""
    monkeypatch.setattr(cuda_graph, "TIMES_SEEN", TIMES_SEEN)


def stand_in(monkeypatch: pytest.MonkeyPatch, graph: type = EagerGraph) -> None:
    """Puts another class in the place of CUDA graphs."""
    EagerGraph.made = []
    capture_soon(monkeypatch)
    for module in (captured_passes, local_updates):
        monkeypatch.setattr(module, "CudaGraph", graph)
        monkeypatch.setattr(module, "new_pool", lambda: None)
    # Adam refuses to count its steps on a CPU as a graph would.
    monkeypatch.setattr(local_updates, "_to_device", lambda optimizer: None)
