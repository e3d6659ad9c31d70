"""Flower's processes: SuperLink with a run at the server, SuperNode at a client."""

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from multiprocessing.connection import Listener
from pathlib import Path
from typing import TextIO

from transformers.utils import logging

from ..federation import FolderLock, read_json
from .client_rows import client_rows
from .federation_file import make_node_trainer
from .node import Node
from .relay import FAMILY, serve


logger = logging.get_logger(__name__)

# The app that SuperLink hands to SuperNodes. At a node it imports nothing but Flower, see `relay.py`; what messages
# look like, see `flower_link.py`.
CLIENT_APP = """\
from multiprocessing.connection import Client

from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp


app = ClientApp()


def answer(message, context):
    asked, answered = message.content["hf_fedmoe"], ArrayRecord()
    with Client(str(context.node_config["socket"]), "AF_UNIX") as connection:
        for place in range(len(asked)):
            connection.send_bytes(asked.pop(str(place)).data)  # Flower keeps the message
        connection.send_bytes(b"")
        while data := connection.recv_bytes():
            piece = Array(dtype="uint8", shape=(len(data),), stype="safetensors", data=data)
            answered[str(len(answered))] = piece
    return Message(RecordDict({"hf_fedmoe": answered}), reply_to=message)


app.query()(answer)
app.train()(answer)
app.evaluate()(answer)
"""
SERVER_APP = """\
from hf_fedmoe.deployment.flower_commands import command_server_app


app = command_server_app()
"""
PROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "hf-fedmoe-federation"
version = "1.0.0"
description = "A federation of hf_fedmoe"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "hf-fedmoe"

[tool.flwr.app.components]
serverapp = "hf_fedmoe_server_app:app"
clientapp = "hf_fedmoe_client_app:app"

[tool.flwr.app.config]
federation = {federation}
"""
CONNECTION = """\
[superlink]
default = "here"

[superlink.here]
address = {address}
{security}
"""
# Nothing is installed at run time, and nobody is told of anything. Flower's chunks, of 5 MB, go back to the system
# when they are freed (glibc): in its threads they leave holes otherwise, as large as a model. The server's app, which
# computes, sets that back, see `flower_link.py`.
ENVIRONMENT = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "MALLOC_MMAP_THRESHOLD_": str(4 * 2**20),
}
START_SECONDS = 60
# How often a client looks whether SuperLink is there, and how the end of its SuperNode is called when it was not.
LOOK_SECONDS = 3
FORGOTTEN = -1000
# What SuperNode says of a SuperLink that does not know its key.
NOT_LET_IN = "Exit Code: 305"
# Of Linux' prctl: the signal that a process gets when its parent ends.
PR_SET_PDEATHSIG = 1
# What the server's app leaves behind when it ends: how it ended.
END_NAME = "_server_app.json"


def run_server(
    federation: str | Path,
    output_dir: str | Path,
    host: str,
    port: int,
    certificates: dict[str, str] | None = None,
    node_keys: Sequence[str] = (),
) -> None:
    """
    Starts a SuperLink, has it run a federation, and stops it when that has ended.

    Args:
        federation (`str`): The YAML.
        output_dir (`str`): The run's folder, in which Flower's files lie too.
        host (`str`), port (`int`): Where SuperLink listens.
        certificates (`dict`, *optional*): Files `certfile`, `keyfile` and `ca_certfile` of TLS; without them nothing
            is encrypted.
        node_keys (`Sequence[str]`, *optional*): Files of public keys of the nodes that may come; any node if left out.

    Raises:
        ValueError: When a key is not there.
        RuntimeError: When Flower's processes do not start, or the run fails.
    """
    if missing := [key for key in node_keys if not Path(key).is_file()]:
        raise ValueError(f"`node_keys` names {missing[0]!r}, which is no file: give the nodes' public keys.")
    folder = Path(output_dir).resolve() / "_flower"  # which is not for the Hub
    end, log = Path(output_dir).resolve() / END_NAME, folder / "superlink.log"
    environment = _environment(folder)
    app = write_app(folder, Path(federation).resolve(), f"{_reachable(host)}:{port}", certificates)
    command = ["flower-superlink", "--host", host, "--port", str(port), *_server_security(certificates)]
    command += ["--disable-runtime-dependency-installation", *(["--enable-supernode-auth"] if node_keys else [])]
    _wait_for_the_last_one(_reachable(host), port, Path(output_dir).resolve())
    end.unlink(missing_ok=True)
    try:
        with log.open("w") as output, _running(command, environment, output) as superlink:
            _wait_for_port(_reachable(host), port, superlink, log)
            for key in node_keys:
                _register(key, environment)
            subprocess.run(["flwr", "run", str(app), "here", "--stream"], env=environment, check=True)
    finally:
        found = read_json(end) or {"fault": "the server's app did not begin"}
        if "pid" in found:  # it runs still
            with suppress(ProcessLookupError):
                os.kill(found["pid"], signal.SIGTERM)
    if found.get("fault", "it ended without a word") is not None:
        raise RuntimeError(f"The run failed: {found.get('fault', 'it ended without a word')}")


def run_client(
    superlink: str,
    data: str,
    folder: str | Path,
    client: int | None = None,
    root_certificates: str | None = None,
    private_key: str | None = None,
) -> None:
    """
    Starts a SuperNode, and answers the messages that it brings until it ends.

    Args:
        superlink (`str`): Its host:port.
        data (`str`): Where the rows are, see [`client_rows`].
        folder (`str`): Of this node alone.
        client (`int`, *optional*): The client's number; left to the server without.
        root_certificates (`str`, *optional*): By which the server's TLS certificate is checked; without it nothing is
            encrypted.
        private_key (`str`, *optional*): The node's own, if the server asks for one.
    """
    place = Path(folder).resolve()
    command = ["flower-supernode", "--superlink", superlink, "--port", str(_free_port())]
    command += ["--insecure"] if root_certificates is None else ["--root-certificates", root_certificates]
    command += [] if private_key is None else ["--auth-supernode-private-key", private_key]
    node = Node(place, lambda sent: make_node_trainer(sent, place, lambda columns: client_rows(data, columns)), client)
    place.mkdir(parents=True, exist_ok=True)
    try:
        lock = FolderLock(place)
    except RuntimeError as error:
        raise ValueError(f"`folder` {str(folder)!r} is that of another client: give each its own.") from error
    host, _, superlink_port = superlink.rpartition(":")
    if not superlink_port.isdigit():
        raise ValueError(f"`superlink` is {superlink!r}: give host:port.")
    code, address, log = FORGOTTEN, (host.strip("[]"), int(superlink_port)), place / "flower" / "supernode.log"
    told = False
    while code == FORGOTTEN or (code and private_key is not None and NOT_LET_IN in log.read_text()):
        if code != FORGOTTEN:  # a server registers keys when it has started
            if not told:
                logger.warning(f"SuperLink does not know the key {private_key!r} yet, and is asked again.")
            told = True
            time.sleep(LOOK_SECONDS)
        _wait_for_superlink(address)
        # Not in `folder`: the names of sockets are short.
        with tempfile.TemporaryDirectory(prefix="hf_fedmoe_") as private:
            code = _run_supernode(command, node, Path(private, "node"), _environment(place / "flower"), address, log)
    lock.release()
    if code:
        raise RuntimeError(f"flower-supernode ended with the code {code}: {log} says why.")


def _run_supernode(
    command: list[str],
    node: Node,
    socket_file: Path,
    environment: dict[str, str],
    superlink: tuple[str, int],
    log: Path,
) -> int:
    """Answers messages until SuperNode ends; returns its code, or `FORGOTTEN` if SuperLink was started again."""
    command = [*command, "--node-config", f"socket={json.dumps(str(socket_file))}"]
    lost = threading.Event()
    with (
        log.open("w") as output,
        Listener(str(socket_file), FAMILY) as listener,
        _running(command, environment, output) as supernode,
    ):
        threading.Thread(target=_watch, args=(superlink, supernode, lost), daemon=True).start()
        code = serve(node, socket_file, supernode, listener)
    return FORGOTTEN if lost.is_set() else code


def _watch(superlink: tuple[str, int], supernode: subprocess.Popen, lost: threading.Event) -> None:
    """Ends a SuperNode whose SuperLink was away and is back: that knows it no more, and it would never ask anew."""
    away = False
    while supernode.poll() is None:
        found = _listens(superlink)
        if found and away:
            lost.set()
            supernode.terminate()
        # Without an answer at all it may be the network, which both survive.
        away = away or found is False
        time.sleep(LOOK_SECONDS)


def _wait_for_superlink(address: tuple[str, int]) -> None:
    told = False
    while not _listens(address):
        if not told:
            logger.warning(f"SuperLink does not listen on {address[0]}:{address[1]} yet, and is waited for.")
            told = True
        time.sleep(LOOK_SECONDS)


def _listens(address: tuple[str, int]) -> bool | None:
    """Tells whether somebody listens at an address, `None` if that cannot be found out."""
    try:
        with socket.create_connection(address, LOOK_SECONDS):
            return True
    except ConnectionRefusedError:
        return False
    except OSError:
        return None


def _register(key: str, environment: dict[str, str]) -> None:
    """Has SuperLink let the node of a public key come."""
    command = ["flwr", "supernode", "register", str(Path(key).resolve()), "here"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    if found.returncode:
        raise RuntimeError(f"The key {key!r} cannot be registered: {' '.join((found.stdout + found.stderr).split())}")


def write_app(folder: Path, federation: Path, address: str, certificates: dict[str, str] | None) -> Path:
    """Writes the app that SuperLink runs, and by what `flwr` finds SuperLink; returns the app's folder."""
    app = folder / "app"
    app.mkdir(parents=True, exist_ok=True)
    (app / "hf_fedmoe_client_app.py").write_text(CLIENT_APP)
    (app / "hf_fedmoe_server_app.py").write_text(SERVER_APP)
    (app / "pyproject.toml").write_text(PROJECT.format(federation=json.dumps(str(federation))))
    security = "insecure = true"
    if certificates is not None:
        security = f"root-certificates = {json.dumps(str(Path(certificates['ca_certfile']).resolve()))}"
    connection = CONNECTION.format(address=json.dumps(address), security=security)
    (folder / "config.toml").write_text(connection)
    return app


def check_flower() -> None:
    """Raises `ImportError` where Flower is not installed."""
    if find_spec("flwr") is None:
        raise ImportError("Clients elsewhere need Flower, which is not installed: pip install 'hf_fedmoe[flower]'.")


def _server_security(certificates: dict[str, str] | None) -> list[str]:
    if certificates is None:
        return ["--insecure"]
    return [part for name, file in certificates.items() for part in (f"--ssl-{name.replace('_', '-')}", file)]


def _environment(flower_home: Path) -> dict[str, str]:
    """The environment of Flower's processes, which call one another by their names."""
    scripts = str(Path(sys.executable).parent)
    path = os.pathsep.join([scripts, os.environ.get("PATH", "")])
    flower_home.mkdir(parents=True, exist_ok=True)
    return {**os.environ, **ENVIRONMENT, "FLWR_HOME": str(flower_home), "PATH": path}


@contextmanager
def _running(command: list[str], environment: dict[str, str], output: TextIO) -> Iterator[subprocess.Popen]:
    """Runs a process of Flower's while a block runs; `output` is where what it says goes."""
    found = shutil.which(command[0], path=environment["PATH"])
    if found is None:
        raise RuntimeError(f"{command[0]} is not there: pip install 'hf_fedmoe[flower]'.")
    process = subprocess.Popen(
        [found, *command[1:]],
        env=environment,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=_end_with_parent if sys.platform == "linux" else None,
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _end_with_parent() -> None:
    """Has this process end when its parent does, which may be killed and then stops nothing (Linux only)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait_for_the_last_one(host: str, port: int, folder: Path) -> None:
    """Waits until a server that was killed a moment ago has left its port and its folder."""
    deadline, told = time.monotonic() + START_SECONDS, False
    while True:
        try:
            if _listens((host, port)):
                raise RuntimeError(f"Something listens on {host}:{port} already: end it, or give another --port.")
            FolderLock(folder).release()
            return
        except RuntimeError as error:
            if time.monotonic() > deadline:
                raise
            if not told:
                logger.warning(f"{error} Waits {START_SECONDS} s for it to end by itself, should it have been killed.")
                told = True
        time.sleep(1)


def _reachable(host: str) -> str:
    """The address at which this machine finds what listens on `host`."""
    return "127.0.0.1" if host in ("0.0.0.0", "") else host


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _wait_for_port(host: str, port: int, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"SuperLink ended with the code {process.returncode}: {log} says why.")
        try:
            with socket.create_connection((host, port), 1):
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"SuperLink does not listen on {host}:{port} after {START_SECONDS} s: {log} says why.")
