"""The arguments and settings of Flower's processes; the processes themselves are tested by test_flower_link.py."""

import ast
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_fedmoe.cli import main
from hf_fedmoe.deployment import launching
from hf_fedmoe.federation import FolderLock


def test_the_app_is_two_files_of_which_a_node_imports_nothing_but_flower(tmp_path):
    app = launching.write_app(tmp_path, tmp_path / "my federation.yaml", "127.0.0.1:8000", None)
    project = tomllib.loads((app / "pyproject.toml").read_text())
    assert project["tool"]["flwr"]["app"]["config"]["federation"] == str(tmp_path / "my federation.yaml")
    assert project["project"]["dependencies"] == []
    client = ast.parse((app / "hf_fedmoe_client_app.py").read_text())
    imported = {node.module for node in ast.walk(client) if isinstance(node, ast.ImportFrom)}
    assert imported == {"multiprocessing.connection", "flwr.app", "flwr.clientapp"}
    ast.parse((app / "hf_fedmoe_server_app.py").read_text())
    connection = tomllib.loads((tmp_path / "config.toml").read_text())["superlink"]
    assert connection == {"default": "here", "here": {"address": "127.0.0.1:8000", "insecure": True}}


def test_with_certificates_nothing_is_insecure(tmp_path):
    files = {"certfile": "server.pem", "keyfile": "server.key", "ca_certfile": str(tmp_path / "ca.crt")}
    launching.write_app(tmp_path, tmp_path / "federation.yaml", "server:8000", files)
    connection = tomllib.loads((tmp_path / "config.toml").read_text())["superlink"]["here"]
    assert connection == {"address": "server:8000", "root-certificates": str(tmp_path / "ca.crt")}
    flags = launching._server_security(files)
    assert flags[::2] == ["--ssl-certfile", "--ssl-keyfile", "--ssl-ca-certfile"]
    assert launching._server_security(None) == ["--insecure"]


def test_flower_tells_nobody_and_installs_nothing(tmp_path):
    environment = launching._environment(tmp_path / "home")
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert environment["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert environment["FLWR_HOME"] == str(tmp_path / "home") and (tmp_path / "home").is_dir()


def test_a_supernode_ends_when_its_superlink_comes_back(monkeypatch):
    monkeypatch.setattr(launching, "LOOK_SECONDS", 0)
    looks, ended = [True, None, False, None, False, True, True], []
    monkeypatch.setattr(launching, "_listens", lambda address: looks.pop(0))
    lost = threading.Event()
    supernode = SimpleNamespace(poll=lambda: 0 if ended else None, terminate=lambda: ended.append(len(looks)))
    launching._watch(("host", 1), supernode, lost)
    assert lost.is_set() and ended == [1]


def test_a_network_that_was_away_ends_no_supernode(monkeypatch):
    monkeypatch.setattr(launching, "LOOK_SECONDS", 0)
    looks = [True, None, None, True]
    monkeypatch.setattr(launching, "_listens", lambda address: looks.pop(0))
    lost = threading.Event()
    launching._watch(("host", 1), SimpleNamespace(poll=lambda: None if looks else 0), lost)
    assert not lost.is_set()


@pytest.mark.parametrize(("key", "tries"), [("key", 3), (None, 1)])
def test_a_node_with_a_key_waits_until_it_is_registered(key, tries, monkeypatch, tmp_path):
    monkeypatch.setattr(launching, "LOOK_SECONDS", 0)
    monkeypatch.setattr(launching, "_wait_for_superlink", lambda address: None)
    commands = []

    def run(command, node, socket_file, environment, superlink, log):
        commands.append(command)
        log.write_text(launching.NOT_LET_IN if len(commands) < 3 else "a disk is full")
        return 1

    monkeypatch.setattr(launching, "_run_supernode", run)
    with pytest.raises(RuntimeError, match=r"ended with the code 1: .*supernode\.log says why"):
        launching.run_client("127.0.0.1:1", "x.csv", tmp_path / "node", root_certificates="ca.pem", private_key=key)
    assert len(commands) == tries
    assert ("--auth-supernode-private-key" in commands[0]) == (key is not None) and "--insecure" not in commands[0]


def test_keys_that_are_not_there_are_named_before_anything_starts(tmp_path):
    with pytest.raises(ValueError, match=r"`node_keys` names 'north\.pub', which is no file"):
        launching.run_server("f.yaml", tmp_path / "run", "127.0.0.1", 1, node_keys=["north.pub"])
    assert not (tmp_path / "run").exists()


def test_a_port_is_open_or_not():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        assert launching._listens(address) is True
    assert launching._listens(address) is False
    launching_port = launching._free_port()
    assert launching._listens(("127.0.0.1", launching_port)) is False


@pytest.mark.parametrize(
    "words, said",
    [
        (["server", "gone.yaml"], "There is no file 'gone.yaml'"),
        (
            ["server", "f.yaml", "--ssl-certfile", "a"],
            "--ssl-certfile, --ssl-keyfile and --ssl-ca-certfile go together",
        ),
        (
            ["client", "--superlink", "host", "--data", "x.csv", "--folder", "n"],
            "`superlink` is 'host': give host:port",
        ),
        (["client", "--superlink", "host:1", "--data", "x.csv"], "the following arguments are required: --folder"),
    ],
)
def test_commands_say_in_one_line_what_is_wrong(words, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launching, "check_flower", lambda: None)
    with pytest.raises(SystemExit) as ended:
        main(words)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and said in error and error.count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_what_a_command_has_started_ends_when_the_command_is_killed(tmp_path):
    script = f"""if True:
        import os, signal, sys
        from hf_fedmoe.deployment.launching import _running
        with open({str(tmp_path / "log")!r}, "w") as log:
            with _running(["sleep", "60"], {{"PATH": os.environ["PATH"]}}, log) as process:
                print(process.pid, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    stat = Path("/proc", killed.stdout.strip(), "stat")
    deadline = time.monotonic() + 10
    while stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert killed.returncode == -signal.SIGKILL


def test_a_port_and_a_folder_that_are_in_use_are_waited_for(monkeypatch, tmp_path):
    monkeypatch.setattr(launching, "START_SECONDS", 0)
    looks, naps = [True, False, False], []
    monkeypatch.setattr(launching, "_listens", lambda address: looks.pop(0))
    with pytest.raises(RuntimeError, match=r"Something listens on 127\.0\.0\.1:1 already: end it, or give another"):
        launching._wait_for_the_last_one("127.0.0.1", 1, tmp_path)
    lock = FolderLock(tmp_path)
    with pytest.raises(RuntimeError, match="is in use by another run"):
        launching._wait_for_the_last_one("127.0.0.1", 1, tmp_path)
    monkeypatch.setattr(launching, "START_SECONDS", 60)
    monkeypatch.setattr(launching, "time", SimpleNamespace(monotonic=time.monotonic, sleep=naps.append))
    looks[:] = [True, True, False]
    lock.release()
    said = []
    monkeypatch.setattr(launching, "logger", SimpleNamespace(warning=said.append))
    launching._wait_for_the_last_one("127.0.0.1", 1, tmp_path)
    assert naps == [1, 1] and looks == []
    assert said == [
        "Something listens on 127.0.0.1:1 already: end it, or give another --port. "
        "Waits 60 s for it to end by itself, should it have been killed."
    ]


def test_without_flower_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setattr(launching, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'hf_fedmoe\[flower\]'"):
        launching.check_flower()
