"""
Runs whose passes and steps are captured end like plain ones, whatever a method does with its clients: by a stand-in
for CUDA graphs that does the work anew, so that a CPU can tell. `tests/training/test_on_gpu.py` has the graphs.
"""

from unittest import mock

import pytest
from numpy.testing import assert_allclose

from hf_fedmoe.federation import LocalTrainer, captured_passes, local_updates
from tests.every_method import LORA_RUNS, RUNS
from tests.federation.test_captured_passes import Again
from tests.runs_on_a_device import run_of_a_method


# FedRep trains other parameters in turns, some of which find their optimizer's state again.
QUICK = ("fedavg", "fedrep", "fedmoe", "apfl")
METHODS = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RUNS | LORA_RUNS]


@pytest.fixture
def captured(monkeypatch):
    """Has runs in this block capture what they can."""
    Again.made = []
    for module in (captured_passes, local_updates):
        monkeypatch.setattr(module, "CudaGraph", Again)
        monkeypatch.setattr(module, "new_pool", lambda: None)
    # Adam refuses to count its steps on a CPU as a graph would.
    monkeypatch.setattr(local_updates, "_to_device", lambda optimizer: None)
    return mock.patch.object(LocalTrainer, "captures", True)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_ends_alike(name, captured, tmp_path):
    expected = run_of_a_method(tmp_path / "plain", True, name)
    assert not Again.made
    with captured:
        found = run_of_a_method(tmp_path / "captured", True, name)
    assert Again.made
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    if "logits" in expected:
        assert_allclose(found["logits"], expected["logits"], rtol=0, atol=1e-4)
