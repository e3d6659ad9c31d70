"""Every comparison of recipes/paper can be planned in each of its sizes."""

from pathlib import Path

import pytest

from hf_fedmoe.experiments.compare import plan_runs, read_comparison


PAPER = sorted((Path(__file__).parents[2] / "recipes" / "paper").glob("*.yaml"))


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_comparison_can_be_planned_in_every_size(path, tmp_path):
    comparison = read_comparison(path)
    assert next(iter(comparison.sizes)) == "small" and "paper" in comparison.sizes
    for size in comparison.sizes:
        runs = plan_runs(comparison, path.parent, tmp_path, size, {"use_cpu": True, "bf16": False})
        assert list(runs) == list(comparison.methods) and all(len(row) == 3 for row in runs.values())
    first_lines = path.read_text().split("\n")[:3]
    assert any(f"`hf-fedmoe compare recipes/paper/{path.name}" in line for line in first_lines)
