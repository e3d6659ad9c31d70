"""The image recipes run as a newcomer would call them, on scikit-learn's digits."""

import json
import re
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_fedmoe.experiments import ImageExperiment, main, parse
from hf_fedmoe.federation import Federation
from hf_fedmoe.models import FedMoEConfig


RECIPES = Path(__file__).parents[2] / "recipes"
SIZES = {"num_clients": 4, "clients_per_round": 2, "reserved_size": 40, "validation_size": 20, "rounds": 2}
SIZES |= {"max_test_examples": 60, "num_train_epochs": 1, "disable_tqdm": True, "dirichlet_alpha": 5}
SMALL = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
TINY = {
    "femnist_cnn": '{"channels": [2, 3], "kernel_size": 3, "padding": 1, "hidden_size": 8}',
    "cifar10_resnet18": '{"embedding_size": 4, "hidden_sizes": [4, 6], "depths": [1, 1]}',
}


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_FEDMOE_DATA", raising=False)

    def run(recipe: str, *settings: str) -> None:
        argv = [recipe, *SMALL, "--model_config", TINY[recipe], "--image_size", "8"]
        monkeypatch.setattr(sys, "argv", [*argv, "--output_dir", str(tmp_path / "run"), *settings])
        main(ImageExperiment, RECIPES / f"{recipe}.yaml")

    return run


@pytest.mark.parametrize("recipe", TINY)
def test_quick_preset_compares_saves_and_classifies(recipe, run, tmp_path, capsys):
    run(recipe, "--compare", "reserved_only", "cent_moe", "fedavg", "fedprox", "fedmoe", "--dataset", "digits")
    folder = tmp_path / "run"
    results = json.loads((folder / "results.json").read_text())
    assert {"majority_class", "reserved_only", "cent_moe", "fedavg", "fedprox", "fedmoe"} <= results.keys()
    assert len({score["accuracy"] for name, score in results.items() if not name.startswith(" ")}) > 2
    for picture in ("gate.png", "clients.png"):
        assert (folder / picture).read_bytes()[:4] == b"\x89PNG"
    card = (folder / "model" / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card
    printed = capsys.readouterr().out
    assert printed.count("truly") == 5 and "custom code" not in printed
    # The reserved set alone: its rounds have as many steps as a client of average size has.
    sizes = json.loads((folder / "reserved_only" / "checkpoint-2" / "federation.json").read_text())["identity"]
    assert sizes["clients_per_round"] == 1 and sizes["num_train_epochs"] > 1


@pytest.mark.parametrize("recipe", TINY)
def test_paper_preset_runs_on_stand_ins(recipe, run, tmp_path, capsys):
    """All of the paper's settings but its sizes: a gate of its own with random weights, augmentation, T."""
    settings = "--preset paper --dataset digits --label_column label --partition dirichlet --use_cpu True --bf16 False"
    run(recipe, *settings.split(), "--num_routed_experts", "3")
    printed = capsys.readouterr().out
    # Before it starts it says how long it will take, and with what memory; a GPU's besides where there is one.
    assert (
        printed.index("fedavg takes about ") < printed.index("fedmoe takes about ") < printed.index("fedavg: 2 rounds")
    )
    assert " of memory, " in printed and " on disk.\n" in printed
    checkpoint = json.loads((tmp_path / "run" / "fedmoe" / "checkpoint-2" / "federation.json").read_text())
    settings = checkpoint["identity"]["strategy_settings"]
    assert (settings["correlation"], settings["synchronisation"]) == ("sum", "after_round")
    assert settings["server_iterations"] == (5 if recipe == "cifar10_resnet18" else 1)
    config = FedMoEConfig.from_pretrained(tmp_path / "run" / "model")
    assert config.gate == "model" and config.gate_config.num_labels == 3
    assert config.gate_config.model_type == config.expert_config.model_type


@pytest.fixture
def letters(tmp_path) -> str:
    """Images of twelve writers in a file without a test split, with coarse labels besides."""
    rng = np.random.default_rng(0)
    rows = {
        "image": [Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)) for _ in range(240)],
        "label": rng.permutation(np.arange(240) % 6),
        "writer_id": [f"w{row % 12}" for row in range(240)],
    }
    rows["coarse_label"] = rows["label"] // 2
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(6),
            "writer_id": datasets.Value("string"),
            "coarse_label": datasets.Value("int64"),
        }
    )
    file = tmp_path / "letters.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(file)
    return str(file)


def recipe_of(*settings: str):
    return parse(ImageExperiment, RECIPES / "femnist_cnn.yaml", [*SMALL, "--image_size", "8", *settings])[0]


def test_test_writers_are_in_no_client(letters):
    settings = "--partition natural --examples_per_client 15 --test_share 0.25 --reserved_size 30"
    recipe = recipe_of("--dataset", letters, *settings.split())
    _, source = recipe.source()
    data = recipe.split(source, seed=3)
    writers = [set(data.client(client)["writer_id"]) for client in range(4)]
    assert [len(data.client(client)) for client in range(4)] == [15] * 4
    assert sum(map(len, writers)) == len(set.union(*writers)) == 9  # no writer at two clients
    test_writers = set(data.test["writer_id"])
    assert len(test_writers) == 3 and not test_writers & (set.union(*writers) | set(data.reserved["writer_id"]))
    assert recipe.split(source, seed=4).test["writer_id"] == data.test["writer_id"]


@pytest.mark.parametrize("partition", ["pachinko", "shards", "dirichlet", "iid", "predominant"])
def test_every_partition_is_at_hand(partition, letters):
    settings = f"--partition {partition} --examples_per_client 12 --num_groups 2"
    recipe = recipe_of("--dataset", letters, *settings.split())
    data = recipe.split(recipe.source()[1], seed=3)
    assert data.num_clients == 4 and data.client_sizes.min() >= 10


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--augmentation", "mirrors"], "`augmentation` is 'mirrors': choose one of photographs, characters, none"),
        (["--partition", "natural", "--client_column", "author"], "`client_column` is 'author', but the data has the"),
        (["--partition", "sorted"], r"`partition` is 'sorted': choose one of predominant.*natural, pachinko"),
        (["--rounds", "0"], "`rounds` is 0: give at least 1"),
        (["--round", "3"], "There is no setting 'round': is it rounds"),
        (["--rounds"], "`rounds` is True: give a whole number"),
        (["--num_clients", "0"], "`num_clients` is 0: give at least 1"),
        (["--clients_per_round", "99"], "`clients_per_round` is 99, but there are 4 clients"),
        (["--compare", "fedavg", "nosuch"], "There is no method 'nosuch': choose from afl"),
        (["--preset", "nosuch"], "`--preset` is 'nosuch': femnist_cnn.yaml has quick, unipen, paper, emnist"),
        (["--dataset", "nosuch"], "None of the data sets could be loaded. No dataset 'nosuch'"),
        (["--model", "small_cn"], "There is no model 'small_cn': .* is it small_cnn"),
        (["--learning_rate", "nan"], "`learning_rate` is nan: give a finite number"),
        (["--learning_rate", "fast"], "`learning_rate` is 'fast': give a number"),
        (["--seed", "-1"], "`seed` is -1: give a whole number from 0"),
        (
            ["--compare", "fedavg", "fedmoe", "--num_main_experts", "0"],
            "`gate` is 'main_features', which reads a main",
        ),
        (["--method_settings", '{"fedprox": {"nu": 1}}'], "`method_settings` gives 'fedprox' a 'nu': it has mu"),
        (["--resume_from_checkpoint", "x"], "`resume_from_checkpoint` is 'x': leave it out"),
        (["--output_dir", __file__], r"`output_dir` is .*where nothing can be written \(File exists\)"),
    ],
)
def test_bad_settings_end_with_one_line_before_anything_is_trained(words, message, run, monkeypatch, capsys):
    monkeypatch.setattr("hf_fedmoe.training.FederatedTrainer.train", None)
    with pytest.raises(SystemExit) as stop:
        run("femnist_cnn", *words)
    last_line = capsys.readouterr().err.strip().split("\n")[-1]
    assert stop.value.code == 2 and re.match(f"femnist_cnn: {message}", last_line), last_line


def test_a_recipe_called_again_goes_on_and_asks_for_another_folder_when_settings_changed(
    run, monkeypatch, capsys, tmp_path
):
    run_round = Federation.run_round

    def stopped(self, round_index, *args):
        if round_index == 1:
            raise KeyboardInterrupt
        return run_round(self, round_index, *args)

    words = ["--compare", "fedavg", "--dataset", "digits"]
    run("femnist_cnn", *words)
    whole = (tmp_path / "run" / "results.json").read_text()
    shutil.rmtree(tmp_path / "run")
    monkeypatch.setattr(Federation, "run_round", stopped)
    with pytest.raises(SystemExit) as stop:
        run("femnist_cnn", *words)
    assert stop.value.code == 130
    assert "femnist_cnn: stopped; the same command goes on" in capsys.readouterr().err
    monkeypatch.undo()
    run("femnist_cnn", *words)
    assert (tmp_path / "run" / "results.json").read_text() == whole
    with pytest.raises(SystemExit) as stop:
        run("femnist_cnn", *words, "--learning_rate", "0.5")
    assert stop.value.code == 2 and "learning_rate" in capsys.readouterr().err.strip().split("\n")[-1]
