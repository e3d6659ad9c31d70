"""Every comparison of recipes can be planned, those of the papers in each of their sizes."""

import re
from pathlib import Path

import pytest

from hf_fedmoe.experiments.compare import plan_runs
from hf_fedmoe.experiments.comparison import read_comparison


RECIPES = Path(__file__).parents[2] / "recipes"
PAPER = sorted((RECIPES / "paper").glob("*.yaml"))


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_comparison_can_be_planned_in_every_size(path, tmp_path):
    comparison = read_comparison(path)
    assert next(iter(comparison.sizes)) == "small" and "paper" in comparison.sizes
    for size in comparison.sizes:
        runs = plan_runs(comparison, path.parent, tmp_path, size, {"use_cpu": True, "bf16": False})
        assert list(runs) == list(comparison.methods) and all(len(row) == 3 for row in runs.values())
    # What a newcomer would type is in the first lines.
    first_lines = path.read_text().split("\n")[:3]
    assert any(f"`hf-fedmoe compare recipes/paper/{path.name}" in line for line in first_lines)


@pytest.mark.parametrize("name", ["fedmoe_defaults", "lora_fusions"])
def test_what_is_our_own_can_be_planned(name, tmp_path):
    path = RECIPES / f"{name}.yaml"
    comparison = read_comparison(path)
    settings = [runs[0].parse()[1] for runs in plan_runs(comparison, path.parent, tmp_path).values()]
    assert len({str(args.to_dict()) for args in settings}) == len(settings) >= 11


def test_the_list_of_tables_names_each_file():
    text = (RECIPES / "paper" / "README.md").read_text()
    named = {name for name in re.findall(r"`(\w+)`", text) if (RECIPES / "paper" / f"{name}.yaml").is_file()}
    assert named == {path.stem for path in PAPER}
