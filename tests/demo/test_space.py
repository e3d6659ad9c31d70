"""The files of a Space."""

import ast

import pytest
from huggingface_hub import SpaceCard

from hf_fedmoe.demo import write_space


def test_a_space_names_the_model_and_nothing_of_this_machine(tmp_path):
    folder = tmp_path / "space"
    paths = write_space("user/a_model", str(folder))
    assert {path.name for path in folder.iterdir()} == {"app.py", "requirements.txt", "README.md"}
    data = SpaceCard.load(folder / "README.md").data
    assert (data.title, data.sdk, data.app_file, data.models) == ("a_model", "gradio", "app.py", ["user/a_model"])
    assert data.python_version == "3.12"  # quoted: 3.1 is another version
    assert (folder / "requirements.txt").read_text() == "hf_fedmoe[demo]\n"
    calls = [node for node in ast.walk(ast.parse((folder / "app.py").read_text())) if isinstance(node, ast.Call)]
    assert [call.args[0].value for call in calls if call.args] == ["user/a_model"]
    assert [path for path in paths if str(tmp_path) in path.read_text()] == []


def test_a_folder_or_a_name_of_none_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    for model in ("runs/mine", "mine", "../x", 'user/"); import os'):
        with pytest.raises(ValueError, match="needs the model's Hub id"):
            write_space(model, "space")
    assert not (tmp_path / "space").exists()


def test_what_is_there_stays(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="is there already, and would be lost"):
        write_space("user/model", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
