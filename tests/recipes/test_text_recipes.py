"""The recipes run as a newcomer would call them, on a few examples."""

import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest


RECIPES = Path(__file__).parents[2] / "recipes"
SIZES = {"num_clients": 3, "clients_per_round": 2, "examples_per_client": 30, "reserved_size": 40, "max_length": 16}
SIZES |= {"validation_size": 20, "max_test_examples": 60, "rounds": 2, "disable_tqdm": True}
SMALL = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def text_federation(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    monkeypatch.delenv("HF_FEDMOE_DATA", raising=False)
    monkeypatch.delenv("HF_FEDMOE_MODELS", raising=False)
    import federated_recipe
    import text_federation

    return SimpleNamespace(
        main=partial(federated_recipe.main, text_federation.TextRecipe), parse=text_federation.TextRecipe.parse
    )


@pytest.mark.parametrize("recipe", ["yelp_gpt2", "sent140_bert"])
def test_quick_preset_compares_saves_and_classifies(recipe, text_federation, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [recipe, *SMALL, "--output_dir", str(tmp_path)])
    text_federation.main(RECIPES / f"{recipe}.yaml")
    results = json.loads((tmp_path / "results.json").read_text())
    assert {"majority_class", "fedavg", "fedmoe"} <= results.keys()
    assert all(0 <= value <= 1 for score in results.values() for value in score.values())
    for picture in ("gate.png", "clients.png"):
        assert (tmp_path / picture).read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "model" / "model.safetensors").is_file()
    printed = capsys.readouterr().out
    assert "preset quick: reviews, experts gpt2-reviews" in printed
    assert printed.count(" star") > 3 and "Loaded back from" in printed


def test_experts_as_adapters(text_federation, tmp_path, monkeypatch, capsys):
    argv = [*SMALL, "--peft", "lora", "--rank", "4", "--lora_fusion", "ffa", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["yelp_gpt2", *argv])
    text_federation.main(RECIPES / "yelp_gpt2.yaml")
    assert (tmp_path / "model" / "model.safetensors").stat().st_size < 400_000
    assert capsys.readouterr().out.count(" star") > 3
    recipe, args = text_federation.parse(RECIPES / "yelp_gpt2.yaml", ["--peft", "lora", "--learning_rate", "1e-3"])
    assert (recipe.rank, recipe.peft_config().r, recipe.peft_config().lora_alpha) == (8, 8, 16)
    assert (args.learning_rate, args.expert_learning_rate, args.lora_fusion) == (1e-3, 2e-3, "svd")
    recipe, args = text_federation.parse(RECIPES / "yelp_gpt2.yaml", [])
    assert recipe.peft_config() is None and (args.learning_rate, args.expert_learning_rate) == (6e-4, 3e-4)
    with pytest.raises(ValueError, match="`peft` is 'dora': choose 'lora' or 'none'"):
        text_federation.parse(RECIPES / "yelp_gpt2.yaml", ["--peft", "dora"])[0].peft_config()


@pytest.mark.parametrize("recipe", ["yelp_gpt2", "sent140_bert"])
def test_paper_preset_runs_on_stand_ins(recipe, text_federation, tmp_path, monkeypatch):
    """All of the paper's settings but its sizes: a gate with weights of its own, Stage C after the round, SGD."""
    stand_ins = "--preset paper --dataset reviews --model gpt2-reviews --gate gpt2-reviews --use_cpu True --bf16 False"
    argv = [recipe, *stand_ins.split(), *SMALL, "--num_train_epochs", "1", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    text_federation.main(RECIPES / f"{recipe}.yaml")
    checkpoint = json.loads((tmp_path / "fedmoe" / "checkpoint-2" / "federation.json").read_text())
    settings = checkpoint["identity"]["strategy_settings"]
    assert (settings["correlation"], settings["synchronisation"]) == ("sum", "after_round")
    assert checkpoint["clients"]


def test_the_command_line_overrides_the_preset(text_federation):
    recipe, args = text_federation.parse(
        RECIPES / "yelp_gpt2.yaml", ["--rounds", "7", "--learning_rate=0.5", "--compare", "fedprox", "fedmoe"]
    )
    assert (args.rounds, args.learning_rate, recipe.compare) == (7, 0.5, ["fedprox", "fedmoe"])
    recipe, args = text_federation.parse(RECIPES / "yelp_gpt2.yaml", ["--preset", "paper", "--use_cpu", "True"])
    assert (recipe.model, recipe.gate, recipe.num_clients) == (["gpt2-medium"], "gpt2", 100)
    assert (args.preset, args.optim.value, args.per_device_train_batch_size) == ("paper", "sgd", 1)


def test_unknown_names_list_the_choices(text_federation, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"`--preset` is 'fast': yelp_gpt2.yaml has quick, paper"):
        text_federation.parse(RECIPES / "yelp_gpt2.yaml", ["--preset", "fast"])
    for name, value, message in (
        ("--compare", "fedsgd", "`compare` names 'fedsgd': choose from fedavg"),
        ("--partition", "sorted", "`partition` is 'sorted': choose one of predominant, dirichlet, iid, shards"),
        ("--dataset", "no_such_reviews", "None of the data sets could be loaded"),
    ):
        monkeypatch.setattr(sys, "argv", ["x", *SMALL, "--output_dir", str(tmp_path), name, value])
        with pytest.raises(ValueError, match=message):
            text_federation.main(RECIPES / "yelp_gpt2.yaml")


def test_controls_print_mean_and_spread_and_keep_finished_seeds(text_federation, tmp_path, monkeypatch, capsys):
    import controls

    settings = ["--seeds", "0", "1", "--jobs", "1", "--methods", "fedavg", "fedmoe", "--out", str(tmp_path)]
    runs = {"majority_class": [(0.5, 0.1)] * 2, "fedavg": [(0.5, 0.3), (0.7, 0.5)], "fedmoe": [(0.6, 0.4), (0.7, 0.2)]}
    for method, scores in runs.items():
        for seed, (accuracy, macro_f1) in enumerate(scores):
            row = {method: {"accuracy": accuracy, "macro_f1": macro_f1}}
            (tmp_path / f"{method}-{seed}.json").write_text(json.dumps(row))
    monkeypatch.setattr(sys, "argv", ["controls.py", "yelp_gpt2", *settings])
    controls.main()
    printed = capsys.readouterr().out
    assert "| fedavg | 60.0 ± 14.1 | 40.0 ± 14.1 | 1 / 2 |" in printed
    assert "| fedmoe | 65.0 ± 7.1 | 30.0 ± 14.1 |  |" in printed


def test_table_of_lora_fusions_from_finished_runs(text_federation, tmp_path, monkeypatch, capsys):
    import lora_fusions

    for number, variant in enumerate(["whole-models", "LoRA-svd"]):
        for seed in (0, 1):
            for method, rows in lora_fusions.ROWS.items():
                score = {"accuracy": 0.5 + 0.1 * seed, "macro_f1": 0.25, "bytes_up": 3e6 / (1 + number)}
                file = tmp_path / f"{variant}-{method}-{seed}.json"
                file.write_text(json.dumps(dict.fromkeys(rows, score)))
    argv = ["x", "sent140_bert", "--seeds", "0", "1", "--variants", "whole models", "LoRA, svd", "--jobs", "1"]
    monkeypatch.setattr(sys, "argv", [*argv, "--out", str(tmp_path)])
    lora_fusions.main()
    printed = capsys.readouterr().out
    scores = "55.0 ± 7.1 / 25.0 ± 0.0"
    assert f"| whole models | {' | '.join([scores] * 5)} | 3,000,000 |" in printed
    assert f"| LoRA, svd | {' | '.join([scores] * 5)} | 1,500,000 |" in printed
    # What a variant is, is said on the command line of the recipe.
    for words in lora_fusions.VARIANTS.values():
        text_federation.parse(RECIPES / "sent140_bert.yaml", words)
