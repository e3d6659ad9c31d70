"""A command says that it loads, on the standard error, and only where there is something to load."""

import argparse
import sys

import pytest

from hf_fedmoe.cli import main
from hf_fedmoe.commands.one_line import announce_loading, in_one_line


def test_loading_is_announced_until_pytorch_is_there(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", object())
    announce_loading()
    assert capsys.readouterr() == ("", "")
    monkeypatch.delitem(sys.modules, "torch")
    announce_loading()
    assert capsys.readouterr() == ("", "Loading PyTorch and transformers ...\n")


@pytest.mark.parametrize(
    ("words", "room"),
    [
        (["train", "--clients", "a.csv"], "experiments"),
        (["diagnose", "--clients", "a.csv"], "experiments"),
        (["evaluate", "m", "a.csv"], "experiments"),
        (["predict", "m", "a.csv"], "experiments"),
        (["compare", "a.yaml"], "experiments"),
        (["demo", "m", "--space", "s"], "demo"),
        (["expert", "merge", "b", "e", "--out", "o"], "owners"),
        (["expert", "remove", "m", "a", "--out", "o"], "owners"),
    ],
)
def test_every_command_that_loads_says_so_first(words, room, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setitem(sys.modules, f"hf_fedmoe.{room}", None)  # whose import then fails, with nothing loaded
    with pytest.raises((SystemExit, ImportError)):
        main(words)
    assert capsys.readouterr().err.startswith("Loading PyTorch and transformers ...\n")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ValueError("'a.csv' has no rows.\n'b.csv' is\tnot UTF-8."),
            "try: 'a.csv' has no rows.\n'b.csv' is not UTF-8.\n",
        ),
        (OSError("no such model\n\nlog in first"), "try: no such model log in first\n"),
    ],
)
def test_each_fault_has_a_line_and_what_a_library_says_one(error, said, capsys):
    with pytest.raises(SystemExit) as ended, in_one_line(argparse.ArgumentParser("try")):
        raise error
    assert ended.value.code == 2 and capsys.readouterr().err == said
