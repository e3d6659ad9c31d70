"""No test may reach for a network, and none pays for what others have imported."""

import gc
import multiprocessing
import os
from collections.abc import Iterator

import pytest


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"


@pytest.fixture(autouse=True, scope="module")
def collect_only_what_tests_make() -> Iterator[None]:
    """
    Keeps what is there before a module's tests from being looked through in every collection: Accelerate asks for two
    of these a run, and with all that is imported each took half a second, most of the time of a tiny run.
    """
    gc.collect()
    gc.freeze()
    yield


@pytest.fixture
def warm_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Comparisons take their processes from a server that has imported what they need: with `spawn`, as outside of tests,
    each imports torch and transformers anew, ten times what its tiny run takes.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.warm_process"])
    monkeypatch.setattr("hf_fedmoe.experiments.side_by_side.multiprocessing.get_context", lambda method: context)
