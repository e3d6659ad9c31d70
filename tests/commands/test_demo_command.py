"""`hf-fedmoe demo` and `push --space`: the files of a Space, and mistakes in a line."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hf_fedmoe.cli import main
from tests.loopback_hub import loopback_hub
from tests.tiny_models import tiny_bert


REPOSITORY = Path(__file__).parents[2]


def refused(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    assert ended.value.code == 2
    err = capsys.readouterr().err.strip()
    assert "\n" not in err
    return err


@pytest.fixture
def no_gradio(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "")  # which the command sets: put back afterwards


@pytest.fixture
def some_gradio(monkeypatch):
    """Stands in for Gradio, which a command asks for before it loads a model."""
    monkeypatch.setitem(sys.modules, "gradio", object())
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "")


def test_without_gradio_the_extra_is_named(no_gradio, capsys):
    assert refused(capsys, "demo", "runs/mine") == (
        "hf-fedmoe demo: The page needs Gradio: `pip install 'hf_fedmoe[demo]'`."
    )
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


def test_without_gradio_nothing_is_loaded(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "gradio", raising=False)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr("hf_fedmoe.commands.demo.find_spec", lambda name: None)
    assert refused(capsys, "demo", "m") == "hf-fedmoe demo: The page needs Gradio: `pip install 'hf_fedmoe[demo]'`."


def test_a_space_needs_no_gradio_and_is_pushed(no_gradio, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    main(["demo", "user/model", "--space", "shown"])
    assert "`hf-fedmoe push shown NAME/SPACE --space`" in capsys.readouterr().out
    with loopback_hub() as hub:
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_loopback", "HF_HUB_OFFLINE": "0"}
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
        environment |= {"PYTHONPATH": str(REPOSITORY)}
        command = [sys.executable, "-m", "hf_fedmoe.cli", "push", "shown", "user/model", "--space"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert hub.created["type"] == "space" and hub.created["sdk"] == "gradio"
        assert hub.files.keys() == {"app.py", "requirements.txt", "README.md"}
        assert hub.files["app.py"] == Path("shown", "app.py").read_bytes()


def test_mistakes_are_said_in_a_line(some_gradio, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    tiny_bert(3).save_pretrained("single")
    capsys.readouterr()  # a bar of saving
    assert "'empty' is no folder of a model, nor of a run" in refused(capsys, "demo", "empty")
    told = refused(capsys, "demo", "single")
    assert "'single' is a model of the type 'bert', no mixture of experts" in told and "hf-fedmoe predict" in told
    assert "needs the model's Hub id. Send it there first" in refused(capsys, "demo", "single", "--space", "shown")
    assert "'empty' is no folder of a Space" in refused(capsys, "push", "empty", "user/space", "--space")
    assert "unrecognized arguments: --share" in refused(capsys, "demo", "single", "--share")
    assert "`port` is 70000: give 1 to 65535." in refused(capsys, "demo", "single", "--port", "70000")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"The port {port} cannot be used" in refused(capsys, "demo", "single", "--port", port)
    assert "invalid int value: 'x'" in refused(capsys, "demo", "single", "--port", "x")
