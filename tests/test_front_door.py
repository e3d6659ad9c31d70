"""The names that `import hf_fedmoe` offers, and what it does not import for them."""

import ast
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import hf_fedmoe
from hf_fedmoe import deployment, experiments, strategies


def test_every_name_is_that_of_its_room():
    for name, room in hf_fedmoe._ROOMS.items():
        assert getattr(hf_fedmoe, name) is getattr(import_module(f"hf_fedmoe.{room}"), name)
    assert set(hf_fedmoe.__all__) <= set(dir(hf_fedmoe))


@pytest.mark.parametrize(
    "package, modules",
    [(hf_fedmoe, hf_fedmoe._ROOMS), (experiments, experiments._MODULES), (deployment, deployment._MODULES)],
)
def test_type_checkers_are_told_every_name_and_no_other(package, modules):
    stub = ast.parse(Path(package.__file__).with_suffix(".pyi").read_text())
    told = {
        alias.asname: (node.module, alias.name)
        for node in ast.walk(stub)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    # `name as name`, or it would be the stub's own.
    assert told == {name: (module, name) for name, module in modules.items()}


def test_every_method_is_offered():
    methods = {
        name
        for name, each in vars(strategies).items()
        if isinstance(each, type) and issubclass(each, strategies.Strategy)
    }
    assert len(methods) > 20 and methods <= set(hf_fedmoe.__all__)


def test_other_names_are_refused_as_those_of_any_module():
    with pytest.raises(AttributeError, match="module 'hf_fedmoe' has no attribute 'FedMoETrainerr'"):
        hf_fedmoe.FedMoETrainerr  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Trainer' from 'hf_fedmoe'"):
        from hf_fedmoe import Trainer  # noqa: F401


def test_only_what_is_used_is_imported():
    look = (
        "import json, sys\nimport hf_fedmoe\n"
        "def rooms():\n"
        "    return [name for name in sys.modules if name.count('.') == 1 and name.startswith('hf_fedmoe.')]\n"
        "first = rooms()\nfrom hf_fedmoe import load_source\nprint(json.dumps([first, rooms()]))"
    )
    result = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    first, second = json.loads(result.stdout)
    assert set(first) == {"hf_fedmoe.lazy_names", "hf_fedmoe.models"}
    assert set(second) - set(first) == {"hf_fedmoe.data"}
