"""
A round of each recipe's paper preset in the paper's size, on a GPU: `pytest -m gpu tests/recipes`. On a CPU the same
commands run with tiny models: `pytest -m slow`.
"""

import json
import math
import re

import pytest
import torch

from tests.recipes.paper_sizes import SIZES, run_paper_size


def check(printed: str, folder, on_gpu: bool) -> None:
    takes = re.findall(r"^(\w+) takes about (.*)\.$", printed, re.MULTILINE)
    assert [method for method, _ in takes] == ["fedavg", "fedmoe"]
    assert all((" on the GPU, " in told) == on_gpu and " of memory, " in told for _, told in takes)
    # Both had a forecast before the first of them began.
    assert printed.index("fedmoe takes about") < printed.index("fedavg: 1 round of")
    results = json.loads((folder / "run" / "results.json").read_text())
    assert {"majority_class", "fedavg", "fedmoe", "  dense", "  best_expert"} <= results.keys()
    assert all(math.isfinite(value) for score in results.values() for value in score.values())
    checkpoint = json.loads((folder / "run" / "fedmoe" / "checkpoint-1" / "federation.json").read_text())
    settings = checkpoint["identity"]["strategy_settings"]
    assert (settings["correlation"], settings["synchronisation"]) == ("sum", "after_round")
    assert checkpoint["clients"] and "Loaded back from" in printed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("recipe", SIZES)
def test_a_round_in_the_papers_size(recipe, tmp_path):
    check(run_paper_size(recipe, tmp_path), tmp_path, on_gpu=True)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SIZES)
def test_the_same_commands_with_tiny_models(recipe, tmp_path):
    check(run_paper_size(recipe, tmp_path, small=True), tmp_path, on_gpu=False)
