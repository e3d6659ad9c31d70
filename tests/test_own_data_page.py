"""docs/own_data.md and the README's own-data example run as they stand, but with fewer rows and rounds."""

import json
import re
import shlex
from pathlib import Path

import pytest
from transformers import pipeline

from hf_fedmoe.cli import main
from hf_fedmoe.demo import load_shown
from tests.test_docs import blocks, newcomer, run  # noqa: F401


def run_commands(block: str, **smaller: str) -> None:
    """Runs the commands of a block in this process, with some values in the place of others."""
    for command in block.replace("\\\n", " ").strip().splitlines():
        program, *words = shlex.split(command)
        assert program == "hf-fedmoe"
        for name, value in smaller.items():
            if f"--{name}" in words:
                words[words.index(f"--{name}") + 1] = value
        main([*words, *(["--use_cpu", "--disable_tqdm"] if words[0] == "train" else [])])


@pytest.fixture
def files(newcomer):  # noqa: F811
    """The page's files, a tenth of their rows."""
    make_files = blocks("docs/own_data.md")[0]
    assert "examples_per_client=600" in make_files
    run(make_files.replace("examples_per_client=600", "examples_per_client=60"))


def test_page_of_own_data(files, capsys):
    _, use, make_images, from_files, from_clients = blocks("docs/own_data.md")
    train, use_it, demo, space, images = blocks("docs/own_data.md", "bash")
    run_commands(train, rounds="1")
    said = capsys.readouterr().out
    assert re.search(r"^fedmoe +\d+\.\d +\d+\.\d$", said, re.MULTILINE) and "fedavg_tuned_at_end (control)" in said
    assert list(json.loads(Path("runs/mine/results.json").read_text()))[-1] == "fedmoe"

    run_commands(use_it)
    said = capsys.readouterr().out
    assert re.search(r"^north, most frequent class +\d", said, re.MULTILINE)
    assert "answers.csv: 60 rows, " in said and "license filled in" in said
    assert run(use)["classify"]("A perfect fit.")[0]["label"] in ("1", "2", "3", "4", "5")

    assert demo.splitlines()[1] == "hf-fedmoe demo runs/mine"
    assert load_shown("runs/mine").facts.clients == ["north", "south", "east"]
    write, push = space.splitlines()
    run_commands(write)
    assert Path(push.split()[2], "app.py").is_file() and push.endswith(" --space")

    assert "select(range(600))" in make_images
    run(make_images.replace("range(600)", "range(120)"))
    run_commands(images, rounds="1")
    assert "digits.csv: 40 rows" in capsys.readouterr().out

    names = run(from_files)
    assert names["data"].client_names == ["north", "south", "east"] and names["digits"].num_labels == 10
    data = run(from_clients)["data"]
    assert data.client_names == ["north", "south"] and data.label_names == ["negative", "neutral", "positive"]


def test_own_data_of_the_readme(files):
    (block,) = blocks("README.md")
    assert "rounds=5" in block
    names = run(block.replace("rounds=5", "rounds=1, use_cpu=True"))
    assert names["trainer"].state.global_step == 1 and names["data"].client_names == ["north", "south", "east"]
    assert pipeline("text-classification", model="runs/python/model")("Fine.")[0]["label"] in "12345"


def test_the_readme_shows_the_command_of_the_page():
    shown = [block for block in blocks("README.md", "bash") if "hf-fedmoe train" in block]
    assert shown == blocks("docs/own_data.md", "bash")[:1]
