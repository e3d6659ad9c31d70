"""
Runs whose passes and steps are captured end like plain ones, whatever a method does with its clients: by a stand-in
for CUDA graphs that does the work anew, so that a CPU can tell. `tests/training/test_on_gpu.py` has the graphs.
"""

from unittest import mock

import pytest
from numpy.testing import assert_allclose

from hf_fedmoe.federation import LocalTrainer
from tests.eager_graphs import EagerGraph, stand_in
from tests.every_method import LORA_RUNS, RUNS
from tests.runs_on_a_device import run_of_a_method


# FedRep trains other parameters in turns, some of which find their optimizer's state again.
QUICK = ("fedavg", "fedrep", "fedmoe", "apfl")
METHODS = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RUNS | LORA_RUNS]


@pytest.fixture
def captured(monkeypatch):
    """Has runs in this block capture what they can."""
    stand_in(monkeypatch)
    return mock.patch.object(LocalTrainer, "captures", True)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_ends_alike(name, captured, tmp_path):
    expected = run_of_a_method(tmp_path / "plain", True, name)
    assert not EagerGraph.made
    with captured:
        found = run_of_a_method(tmp_path / "captured", True, name)
    assert EagerGraph.made
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    if "logits" in expected:
        assert_allclose(found["logits"], expected["logits"], rtol=0, atol=1e-4)
