"""Commands rehearse what has not begun, before anything trains."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_fedmoe.experiments import ImageExperiment, main, own_run, recipe, run_comparison
from hf_fedmoe.experiments.own_run import train_own
from tests.experiments.test_run_comparison import runs_of, written


RECIPE = Path(__file__).parents[2] / "recipes" / "femnist_cnn.yaml"


class TrainedError(Exception):
    """Ends a command where it begins to train."""


@pytest.fixture
def rehearsed(monkeypatch):
    methods = []

    def stand_in(method, *others):
        methods.append(method)
        return "a moment"

    def train(trainer):
        raise TrainedError

    for module in (own_run, recipe):
        monkeypatch.setattr(module, "rehearse", stand_in)
        monkeypatch.setattr(module, "train_or_go_on", train)
    return methods


@pytest.mark.parametrize(
    ("asks", "begun", "expected"), [(True, False, ["fedavg"]), (True, True, []), (False, False, [])]
)
def test_own_files(asks, begun, expected, rehearsed, tmp_path, capsys):
    for name in ("north", "south"):
        rows = [f"text {row} of {name},{'good' if row % 2 else 'bad'}" for row in range(30)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    if begun:
        (tmp_path / "run" / "fedavg" / "checkpoint-1").mkdir(parents=True)
    clients = [str(tmp_path / f"{name}.csv") for name in ("north", "south")]
    told = {
        "clients": clients,
        "text_column": "text",
        "label_column": "label",
        "model": "gpt2-reviews",
        "output_dir": str(tmp_path / "run"),
        "use_cpu": True,
    }
    with pytest.raises(TrainedError):
        train_own(told | {"rehearse": asks, "rounds": 1}, images=False, method="fedavg")
    assert rehearsed == expected
    assert ("fedavg takes a moment." in capsys.readouterr().out) == bool(expected)


def test_recipes(rehearsed, tmp_path, monkeypatch, capsys):
    (tmp_path / "fedprox" / "checkpoint-1").mkdir(parents=True)
    words = "--dataset digits --model small_cnn --image_size 8 --compare fedprox fedavg --rehearse true --use_cpu true"
    monkeypatch.setattr(sys, "argv", ["femnist_cnn", *words.split(), "--output_dir", str(tmp_path)])
    with pytest.raises(TrainedError):
        main(ImageExperiment, RECIPE)
    assert rehearsed == ["fedavg"] and "fedavg takes a moment." in capsys.readouterr().out


def test_rows_of_a_comparison(tmp_path):
    """The first seed of a row that has not begun; none of a row whose seeds all have."""
    settings = {"rehearse": True}
    path = written(tmp_path, methods={"a": "fedavg", "b": "fedprox", "c": "majority_class"}, seeds=[0, 1])
    runs = [run for row in runs_of(path, tmp_path / "out", **settings).values() for run in row]
    for begun in ("a/seed-0", "b/seed-0", "b/seed-1"):
        (tmp_path / "out" / begun / "checkpoint-1").mkdir(parents=True)
    tasks = []

    def run(function, given, watch):
        tasks.extend(given)
        return iter(())

    run_comparison._rehearse(
        runs, SimpleNamespace(run=run, num_processes=1), SimpleNamespace(rehearse=None, say=print)
    )
    assert [(task.row, task.seed) for task in tasks] == [("a", 1)]
