"""`--help` of a recipe: its own settings first."""

import re
import sys
from pathlib import Path

import pytest

from hf_fedmoe.experiments import CharacterExperiment, ImageExperiment, TextExperiment, main, method_names
from hf_fedmoe.experiments.settings import settings_of
from hf_fedmoe.training import FedMoETrainingArguments


RECIPES = Path(__file__).parents[2] / "recipes"
KINDS = {
    "yelp_gpt2": TextExperiment,
    "sent140_bert": TextExperiment,
    "femnist_cnn": ImageExperiment,
    "cifar10_resnet18": ImageExperiment,
    "shakespeare_lstm": CharacterExperiment,
}


def help_of(recipe, monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", [recipe, *words])
    monkeypatch.setenv("COLUMNS", "100")
    main(KINDS[recipe], RECIPES / f"{recipe}.yaml")
    return capsys.readouterr().out


def options(text):
    return re.findall(r"^  --(\w+)", text, re.MULTILINE)


@pytest.mark.parametrize("recipe", KINDS)
def test_own_settings_come_first(recipe, monkeypatch, capsys):
    text = help_of(recipe, monkeypatch, capsys, "--help")
    found = options(text)
    assert found[:6] == ["preset", "compare", "dataset", "model", "rounds", "num_clients"]
    headings = re.findall(r"^(\S.*):$", text, re.MULTILINE)
    assert headings[0] == "the recipe" and headings[-1] == "Fed-MoE"
    assert headings.index("federation") < headings.index("local training of a client")
    words = text.split()
    assert all(any(word.strip(".,") == method for word in words) for method in method_names())
    assert "quick (" in " ".join(words) and "paper (" in " ".join(words) and "push_to_hub" not in found
    assert len(found) == len(set(found)) and f"[runs/{recipe}]" in text


def test_everything_is_shown_when_asked_for(monkeypatch, capsys):
    found = options(help_of("yelp_gpt2", monkeypatch, capsys, "--help-all"))
    known = settings_of(TextExperiment, FedMoETrainingArguments)
    assert len(found) == len(set(found))
    # Fed-MoE's own preset has another name, and where settings come from is no setting.
    assert set(found) == known.keys() - {"preset_name"} | {"preset_of_method"}
    assert found[-1] > found[-30] > "a" and found[0] == "preset"


def test_values_are_those_of_the_preset(monkeypatch, capsys):
    quick = " ".join(help_of("femnist_cnn", monkeypatch, capsys, "--help").split())
    paper = " ".join(help_of("femnist_cnn", monkeypatch, capsys, "--preset", "paper", "-h").split())
    assert "Rounds of the federation. [20]" in quick and "Rounds of the federation. [100]" in paper
    assert "[flwrlabs/femnist]" in paper and "[digits]" in quick


def test_an_unknown_preset_is_told(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        help_of("femnist_cnn", monkeypatch, capsys, "--help", "--preset", "papre")
    assert stop.value.code == 2 and "`--preset` is 'papre': femnist_cnn.yaml has quick" in capsys.readouterr().err
