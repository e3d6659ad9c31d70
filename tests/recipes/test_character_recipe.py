"""The character recipe runs as a newcomer would call it, on the shipped plays."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from hf_fedmoe.experiments import CharacterExperiment, main, parse
from hf_fedmoe.models import FedMoEConfig


# So few windows lack the rarest letters.
pytestmark = pytest.mark.filterwarnings("ignore:.* have classes of which no client has a row")

RECIPES = Path(__file__).parents[2] / "recipes"
SETTINGS = RECIPES / "shakespeare_lstm.yaml"
SIZES = {"num_clients": 4, "clients_per_round": 2, "server_roles": 2, "reserved_size": 40, "validation_size": 20}
SIZES |= {"examples_per_client": 30, "stride": 40, "min_windows": 50, "max_test_examples": 60, "rounds": 2}
SIZES |= {"disable_tqdm": True, "per_device_train_batch_size": 16}
SMALL = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
SMALL += ["--model_config", '{"hidden_size": 8}']


@pytest.fixture
def recipes(monkeypatch):
    monkeypatch.delenv("HF_FEDMOE_DATA", raising=False)

    def run(*argv: str) -> None:
        monkeypatch.setattr(sys, "argv", ["shakespeare_lstm", *SMALL, *argv])
        main(CharacterExperiment, SETTINGS)

    def parsed(*argv: str):
        return parse(CharacterExperiment, SETTINGS, [*SMALL, *argv])[0]

    run.parse = parsed
    return run


def test_quick_preset_compares_saves_and_writes_on(recipes, tmp_path, capsys):
    recipes("--compare", "reserved_only", "fedavg", "fedprox", "fedmoe", "--output_dir", str(tmp_path))
    results = json.loads((tmp_path / "results.json").read_text())
    assert {"majority_class", "reserved_only", "fedavg", "fedprox", "fedmoe", "  oracle_expert"} <= results.keys()
    assert all(0 <= value <= 1 for score in results.values() for value in score.values())
    for picture in ("gate.png", "clients.png"):
        assert (tmp_path / picture).read_bytes()[:4] == b"\x89PNG"
    card = (tmp_path / "model" / "README.md").read_text()
    assert "string.printable.index" in card and "nan" not in card.split("Which expert takes which class")[1][:2000]
    printed = capsys.readouterr().out
    assert "preset quick: shakespeare, experts char_lstm" in printed
    assert printed.count(", truly ") == 5 and printed.count(" goes on ") == 1
    assert "custom code" not in printed and (tmp_path / "model" / "modeling_char_lstm.py").is_file()


def test_paper_preset_runs_on_the_shipped_plays(recipes, tmp_path):
    """All of its settings but the sizes: the gate is a network of its own, SGD, Fed-MoE by the paper's letter."""
    stand_ins = "--preset paper --dataset shakespeare --use_cpu True --num_routed_experts 2 --compare fedmoe"
    stand_ins += " --rehearse False"
    recipes(*stand_ins.split(), "--output_dir", str(tmp_path))
    checkpoint = json.loads((tmp_path / "fedmoe" / "checkpoint-2" / "federation.json").read_text())["identity"]
    assert checkpoint["strategy_settings"]["synchronisation"] == "after_round"
    config = FedMoEConfig.from_pretrained(tmp_path / "model")
    assert (config.gate, config.gate_config.model_type, config.gate_config.num_labels) == ("model", "char_lstm", 2)
    assert (config.expert_config.vocab_size, config.num_labels) == (100, 100)


def test_paper_preset_has_the_published_network(recipes):
    recipe, args = parse(CharacterExperiment, SETTINGS, ["--preset", "paper", "--use_cpu", "True"])
    assert (recipe.window, recipe.stride, recipe.num_clients, args.optim.value) == (80, 1, 710, "sgd")
    assert recipe._build(recipe.model[0], {"num_labels": 100}).num_parameters() == 825_220


def test_roles_are_clients_and_the_server_has_its_own(recipes):
    recipe = recipes.parse("--server_roles", "4")
    _, source = recipe.source()
    data = recipe.split(source, seed=3)
    roles = [set(data.client(client)["role_id"]) for client in range(4)]
    assert [len(role) for role in roles] == [1] * 4 and len(set.union(*roles)) == 4
    assert data.client_sizes.tolist() == [30] * 4
    reserved, validation = set(data.reserved["role_id"]), set(data.validation["role_id"])
    assert len(reserved) == len(validation) == 2 and not reserved & validation
    assert not (reserved | validation) & set.union(*roles)
    assert set(data.test["role_id"]) <= set.union(*roles) and len(data.test) == 60
    assert (len(data.reserved), len(data.validation)) == (40, 20)
    # What clients have is of their first lines, what is tested of their last.
    trained = {bytes(row) for row in source["train"]["input_ids"]}
    assert not trained & {bytes(row) for row in data.test["input_ids"]}
    other = recipe.split(source, seed=4)
    assert other.test["input_ids"][:] == data.test["input_ids"][:]
    assert set(other.client(0)["role_id"]) == roles[0]
    assert other.client(0)["input_ids"][:] != data.client(0)["input_ids"][:]
    assert recipe.split(source, seed=3).state_fingerprint() == data.state_fingerprint()


@pytest.mark.parametrize("partition", ["iid", "shards", "dirichlet"])
def test_other_partitions_divide_all_roles_but_those_of_the_server(partition, recipes):
    recipe = recipes.parse("--partition", partition, "--dirichlet_alpha", "5")
    data = recipe.split(recipe.source()[1], seed=3)
    assert data.num_clients == 4 and data.client_sizes.min() >= 10
    assert len(set(np.concatenate([data.client(client)["role_id"] for client in range(4)]))) > 10
    assert not set(data.reserved["role_id"]) & set(data.client(0)["role_id"])


def test_bad_settings_name_the_choices(recipes, tmp_path, capsys):
    for name, value, message in (
        ("--server_roles", "1", "`server_roles` is 1: give at least 2"),
        (
            "--num_clients",
            "60",
            r"`server_roles` is 2 and `num_clients` 60, but only \d\d roles have `min_windows` = 50",
        ),
        ("--reserved_size", "9999", r"`reserved_size` is 9999, but the server's roles for it have \d+ windows"),
        ("--partition", "sorted", r"`partition` is 'sorted': choose one of predominant.*natural"),
        ("--dataset", "sonnets", "None of the data sets could be loaded. No dataset 'sonnets'"),
        (
            "--role_column",
            "speaker",
            "None of the data sets could be loaded. role_column is 'speaker', but",
        ),
    ):
        with pytest.raises(SystemExit) as stop:
            recipes(name, value, "--output_dir", str(tmp_path))
        last_line = capsys.readouterr().err.strip().split("\n")[-1]
        assert stop.value.code == 2 and re.match(f"shakespeare_lstm: {message}", last_line), last_line
