"""The recipes run as a newcomer would call them, on a few examples."""

import json
import re
import sys
from pathlib import Path

import pytest

from hf_fedmoe.experiments import TextExperiment, main, parse


RECIPES = Path(__file__).parents[2] / "recipes"
SIZES = {"num_clients": 3, "clients_per_round": 2, "examples_per_client": 30, "reserved_size": 40, "max_length": 16}
SIZES |= {"validation_size": 20, "max_test_examples": 60, "rounds": 2, "disable_tqdm": True}
SMALL = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]


@pytest.fixture(autouse=True)
def shipped_only(monkeypatch):
    monkeypatch.delenv("HF_FEDMOE_DATA", raising=False)
    monkeypatch.delenv("HF_FEDMOE_MODELS", raising=False)


@pytest.mark.parametrize("recipe", ["yelp_gpt2", "sent140_bert"])
def test_quick_preset_compares_saves_and_classifies(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [recipe, *SMALL, "--output_dir", str(tmp_path)])
    main(TextExperiment, RECIPES / f"{recipe}.yaml")
    results = json.loads((tmp_path / "results.json").read_text())
    assert {"majority_class", "fedavg", "fedmoe"} <= results.keys()
    assert all(0 <= value <= 1 for score in results.values() for value in score.values())
    for picture in ("gate.png", "clients.png"):
        assert (tmp_path / picture).read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "model" / "model.safetensors").is_file()
    printed = capsys.readouterr().out
    assert "preset quick: reviews, experts gpt2-reviews" in printed
    assert printed.count(" star") > 3 and "Loaded back from" in printed


def test_experts_as_adapters(tmp_path, monkeypatch, capsys):
    argv = [*SMALL, "--peft", "lora", "--rank", "4", "--lora_fusion", "ffa", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["yelp_gpt2", *argv])
    main(TextExperiment, RECIPES / "yelp_gpt2.yaml")
    assert (tmp_path / "model" / "model.safetensors").stat().st_size < 400_000
    assert capsys.readouterr().out.count(" star") > 3
    recipe, args = parse(TextExperiment, RECIPES / "yelp_gpt2.yaml", ["--peft", "lora", "--learning_rate", "1e-3"])
    assert (recipe.rank, recipe.peft_config().r, recipe.peft_config().lora_alpha) == (8, 8, 16)
    assert recipe.peft_config().fan_in_fan_out  # of GPT-2
    assert (args.learning_rate, args.expert_learning_rate, args.lora_fusion) == (1e-3, 2e-3, "svd")
    recipe, args = parse(TextExperiment, RECIPES / "yelp_gpt2.yaml", [])
    assert recipe.peft_config() is None and (args.learning_rate, args.expert_learning_rate) == (6e-4, 3e-4)
    with pytest.raises(ValueError, match="`peft` is 'dora': choose 'lora' or 'none'"):
        parse(TextExperiment, RECIPES / "yelp_gpt2.yaml", ["--peft", "dora"])


@pytest.mark.parametrize("recipe", ["yelp_gpt2", "sent140_bert"])
def test_paper_preset_runs_on_stand_ins(recipe, tmp_path, monkeypatch, capsys):
    """All of the paper's settings but its sizes: a gate with weights of its own, Stage C after the round, SGD."""
    stand_ins = "--preset paper --dataset reviews --model gpt2-reviews --gate gpt2-reviews --use_cpu True --bf16 False"
    stand_ins += " --rehearse False"
    argv = [recipe, *stand_ins.split(), *SMALL, "--num_train_epochs", "1", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    main(TextExperiment, RECIPES / f"{recipe}.yaml")
    assert " takes about " not in capsys.readouterr().out
    checkpoint = json.loads((tmp_path / "fedmoe" / "checkpoint-2" / "federation.json").read_text())
    settings = checkpoint["identity"]["strategy_settings"]
    assert (settings["correlation"], settings["synchronisation"]) == ("sum", "after_round")
    assert checkpoint["clients"]


def test_the_command_line_overrides_the_preset():
    recipe, args = parse(
        TextExperiment,
        RECIPES / "yelp_gpt2.yaml",
        ["--rounds", "7", "--learning_rate=0.5", "--compare", "fedprox", "fedmoe"],
    )
    assert (args.rounds, args.learning_rate, recipe.compare) == (7, 0.5, ["fedprox", "fedmoe"])
    recipe, args = parse(TextExperiment, RECIPES / "yelp_gpt2.yaml", ["--preset", "paper", "--use_cpu", "True"])
    assert (recipe.model, recipe.gate, recipe.num_clients) == (["gpt2-medium"], "gpt2", 100)
    assert (args.preset, args.optim.value, args.per_device_train_batch_size) == ("paper", "sgd", 1)


def test_batches_of_few_shapes_where_that_is_asked_for():
    recipe, _ = parse(TextExperiment, RECIPES / "yelp_gpt2.yaml", ["--pad_to_multiple_of", "16"])
    tokenizer = recipe.load_processor()
    collate = recipe.collators(tokenizer)["data_collator"]
    rows = [{"input_ids": list(range(5, 5 + length)), "label": 1} for length in (3, 17)]
    batch, short = collate(rows), collate(rows[:1])
    assert batch["input_ids"].shape == (2, 32) and short["input_ids"].shape == (1, 16)
    assert batch["attention_mask"].sum(1).tolist() == [3, 17] and batch["labels"].tolist() == [1, 1]
    assert parse(TextExperiment, RECIPES / "yelp_gpt2.yaml", [])[0].collators(tokenizer) == {}
    for recipe_name in ("yelp_gpt2", "sent140_bert"):
        paper, _ = parse(TextExperiment, RECIPES / f"{recipe_name}.yaml", ["--preset", "paper", "--use_cpu", "True"])
        assert paper.pad_to_multiple_of == 16 and paper.rehearse
    for told, message in (("0", "is 0: give at least 1"), ("24", "is 24, of which `max_length` = 64 is no multiple")):
        with pytest.raises(ValueError, match=f"`pad_to_multiple_of` {message}"):
            parse(TextExperiment, RECIPES / "yelp_gpt2.yaml", ["--pad_to_multiple_of", told])


def test_unknown_names_list_the_choices(tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match=r"`--preset` is 'fast': yelp_gpt2.yaml has quick, paper"):
        parse(TextExperiment, RECIPES / "yelp_gpt2.yaml", ["--preset", "fast"])
    for name, value, message in (
        ("--compare", "fedsgd", "There is no method 'fedsgd': is it fedavg .*fedjets.* There are .*fedmoe"),
        ("--partition", "sorted", "`partition` is 'sorted': choose one of predominant, dirichlet, iid, shards"),
        ("--dataset", "no_such_reviews", "None of the data sets could be loaded"),
    ):
        monkeypatch.setattr(sys, "argv", ["x", *SMALL, "--output_dir", str(tmp_path), name, value])
        with pytest.raises(SystemExit) as stop:
            main(TextExperiment, RECIPES / "yelp_gpt2.yaml")
        last_line = capsys.readouterr().err.strip().split("\n")[-1]
        assert stop.value.code == 2 and re.match(f"yelp_gpt2: {message}", last_line), last_line


def test_bars_are_shown_unless_told_otherwise():
    for words, hidden in (([], False), (["--disable_tqdm", "True"], True), (["--preset", "paper"], False)):
        _, args = parse(TextExperiment, RECIPES / "yelp_gpt2.yaml", [*words, "--use_cpu", "True", "--bf16", "False"])
        assert args.disable_tqdm is hidden
