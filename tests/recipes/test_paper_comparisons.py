"""Every comparison of recipes can be planned, those of the papers in each of their sizes."""

import re
from pathlib import Path

import pytest

from hf_fedmoe.experiments.comparison import read_comparison
from hf_fedmoe.experiments.run_comparison import plan_runs
from hf_fedmoe.experiments.runs import try_out


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


# The data sets at hand for those that have no size for them.
STAND_INS = {"dataset": "digits", "partition": "iid", "max_train_examples": 1500, "examples_per_client": 10}
STAND_INS |= {"num_clients": 12, "clients_per_round": 3, "reserved_size": 60, "validation_size": 60}


@pytest.mark.parametrize(
    "path",
    [
        path if path.stem in ("table8_femnist", "pfedmm_models") else pytest.param(path, marks=pytest.mark.slow)
        for path in PAPER
    ],
    ids=lambda path: path.stem,
)
def test_everything_up_to_training_can_be_made(path, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_FEDMOE_DATA", raising=False)
    comparison = read_comparison(path)
    comparison.seeds = [0]
    size = "tiny" if "tiny" in comparison.sizes else "small"
    overrides = {"use_cpu": True, "bf16": False, **(STAND_INS if size == "small" else {})}
    runs = plan_runs(comparison, path.parent, tmp_path / "out", size, overrides)
    monkeypatch.setattr("hf_fedmoe.training.FederatedTrainer.train", None)
    try_out([run for row in runs.values() for run in row])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["fedmoe_defaults", "lora_fusions"])
def test_what_is_our_own_can_be_planned(name, tmp_path):
    path = RECIPES / f"{name}.yaml"
    comparison = read_comparison(path)
    settings = [runs[0].parse()[1] for runs in plan_runs(comparison, path.parent, tmp_path).values()]
    assert len({str(args.to_dict()) for args in settings}) == len(settings) >= 11


@pytest.mark.parametrize("name", ["labels", "photographs", "pictures", "reviews", "rotations"])
def test_comparisons_of_groups_can_be_planned(name, tmp_path):
    path = RECIPES / "groups" / f"{name}.yaml"
    comparison = read_comparison(path)
    runs = plan_runs(comparison, path.parent, tmp_path)
    assert list(runs) == list(comparison.methods) and comparison.reference in runs
    experiment, args = runs["Fed-MoE of groups"][0].parse()
    assert (experiment.partition, experiment.num_domains, args.rounds) == (
        "domains",
        4,
        runs["FedAvg"][0].parse()[1].rounds,
    )
    assert f"`hf-fedmoe compare recipes/groups/{name}.yaml`" in path.read_text().split("\n")[1]


def test_the_shipped_comparison_of_groups_can_be_made(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_FEDMOE_DATA", raising=False)
    path = RECIPES / "groups" / "reviews.yaml"
    comparison = read_comparison(path)
    comparison.seeds = [0]
    small = {"num_clients": 8, "examples_per_client": 40, "clients_per_round": 2, "reserved_size": 40}
    runs = plan_runs(comparison, path.parent, tmp_path / "out", None, small | {"validation_size": 0})
    try_out([run for row in runs.values() for run in row])
    assert not (tmp_path / "out").exists()


def test_the_list_of_tables_names_each_file():
    text = (RECIPES / "paper" / "README.md").read_text()
    named = {name for name in re.findall(r"`(\w+)`", text) if (RECIPES / "paper" / f"{name}.yaml").is_file()}
    assert named == {path.stem for path in PAPER}
