"""The image recipes run as a newcomer would call them, on scikit-learn's digits."""

import json
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_fedmoe.experiments import ImageExperiment, main, parse
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
        argv = [recipe, *SMALL, "--model_config", TINY[recipe], "--image_size", "8", *settings]
        monkeypatch.setattr(sys, "argv", [*argv, "--output_dir", str(tmp_path / "run")])
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
def test_paper_preset_runs_on_stand_ins(recipe, run, tmp_path):
    """All of the paper's settings but its sizes: a gate of its own with random weights, augmentation, T."""
    settings = "--preset paper --dataset digits --label_column label --partition dirichlet --use_cpu True --bf16 False"
    run(recipe, *settings.split(), "--num_routed_experts", "3")
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


def test_bad_settings_name_the_choices(run, letters):
    with pytest.raises(ValueError, match="`augmentation` is 'mirrors': choose one of photographs, characters, none"):
        run("femnist_cnn", "--augmentation", "mirrors")
    with pytest.raises(ValueError, match="`client_column` is 'author', but the data has the columns"):
        run("femnist_cnn", "--dataset", letters, "--partition", "natural", "--client_column", "author")
    with pytest.raises(ValueError, match=r"`partition` is 'sorted': choose one of predominant.*natural, pachinko"):
        run("femnist_cnn", "--partition", "sorted")
