"""`hf-fedmoe diagnose`, on clients to half of whom the same words mean something else."""

import csv

import numpy as np
import pytest
from PIL import Image

from hf_fedmoe.cli import main
from tests.commands.test_own_data_commands import CLASSES, write_file


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clients")
    paths = [folder / f"{name}.csv" for name in ("a", "b", "c", "d")]
    for seed, path in enumerate(paths):
        write_file(path, 90, seed)
        if seed % 2:
            with path.open() as file:
                header, *rows = csv.reader(file)
            moved = {old: CLASSES[i - 1] for i, old in enumerate(CLASSES)}
            with path.open("w", newline="") as file:
                csv.writer(file).writerows([header, *([text, moved[mood]] for text, mood in rows)])
    return [str(path) for path in paths]


def told(files, *more):
    main(["diagnose", "--clients", *files, "--text_column", "review", "--label_column", "mood", *more])


def test_groups_are_told_and_nothing_is_written(files, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told(files)
    shown = capsys.readouterr().out
    assert "| clients | 4 |" in shown and "| groups | 2 |" in shown
    assert "Compare `fedmoe_groups` with 2 routed experts" in shown
    assert list(tmp_path.iterdir()) == []


def test_the_same_seed_says_the_same(files, capsys):
    said = []
    for seed in ("1", "1", "2"):
        told(files[:2], "--seed", seed)
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]
    assert "cannot be told of fewer than 4 clients" in said[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rounds", "3"], "unrecognized arguments: --rounds 3"),
        (["--images", "x"], "give either --clients"),
        (["--model", "no/such"], "no/such"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(files, words, message, capsys):
    with pytest.raises(SystemExit) as end:
        told(files, *words)
    assert end.value.code == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1


def test_images_too(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for client in "abcd":
        for name, level in (("dark", 60), ("light", 190)):
            folder = tmp_path / client / name
            folder.mkdir(parents=True)
            for i in range(15):
                pixels = np.clip(rng.normal(level, 20, (8, 8)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    main(["diagnose", "--images", *(str(tmp_path / client) for client in "abcd")])
    shown = capsys.readouterr().out
    assert "| groups | 1 |" in shown and "Clients look alike" in shown
