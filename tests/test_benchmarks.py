"""Benchmarks run: what they time by name is there, and each ends in its small size."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest


FOLDER = Path(__file__).parents[1] / "benchmarks"
# Those that need a GPU, Flower, two launched processes or peers, or are no benchmark of their own.
NOT_ALONE = {
    "machine",
    "on_gpu",
    "on_the_wire",
    "peer_bare",
    "peer_flower",
    "peer_ours",
    "peer_pfl",
    "peer_work",
    "yelp_round",
}
BENCHMARKS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in NOT_ALONE)


@pytest.mark.parametrize("name", ["round", "image_round"])
def test_what_is_timed_by_name_is_there(name, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module(name)
    stages = [each for listed in vars(module).values() if isinstance(listed, list) for each in listed]
    timed = [each for each in stages if isinstance(each, tuple) and len(each) == 3 and isinstance(each[1], str)]
    assert timed
    for owner, function, stage in timed:
        assert callable(vars(owner).get(function)), f"{stage}: {owner} has no {function} of its own"


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_ends(name):
    if name == "example_privacy_cost":
        pytest.importorskip("opacus", reason="example-level privacy is by Opacus: pip install 'hf_fedmoe[test]'")
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--quick"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=FOLDER.parent, check=False)
    assert result.returncode == 0 and result.stdout.count("|") > 5, result.stderr[-2000:]
