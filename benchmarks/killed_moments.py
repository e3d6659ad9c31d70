"""
Kills of a federation over Flower on this machine, at random moments of its rounds: processes of a node, of the server,
or the link between them. What was killed is started again by its own command; then the run must end, with the bits of
one that nobody disturbed (in one process, a moment), or with a log that names who was missing. Needs
`hf_fedmoe[flower]`.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from on_the_wire import write_files
from safetensors.torch import load_file
from transformers.utils import logging

from hf_fedmoe.cli import main as command
from hf_fedmoe.deployment import Answer, Message, Node, make_node_trainer, make_server_trainer
from hf_fedmoe.deployment.client_rows import client_rows


# Both methods keep at a node its optimizer and what `top_k` left out of its uploads.
FEDERATION = """\
model: [model]
method: {method}
labels: [bad, good]
num_clients: 2
min_clients: {min_clients}
clients_per_round: 2
round_timeout: {round_timeout}
reserved: rows.csv
validation: rows.csv
rounds: {rounds}
{routed}max_length: 8
optim: adamw_torch
keep_client_optimizer: true
upload_compression: top_k
top_k_share: 0.1
save_strategy: steps
save_steps: 1
use_cpu: true
output_dir: run
"""
ROUTED = "num_routed_experts: 2\ngate_epochs: 1\nfinal_expert_epochs: 1\n"
NODES = ("north", "south")
EXECUTOR = "flower-superexec"
# Imports take most of a command's start: commands are forked from a process that has them.
FORKS = multiprocessing.get_context("forkserver")


class Link:
    """The only way from nodes to the server: a port whose connections go to another one, while it lives."""

    def __init__(self, port: int, target: int):
        self.port, self.target = port, target
        self.flows = threading.Event()
        self.connections: set[socket.socket] = set()
        self.listener: socket.socket | None = None
        self.open()

    def open(self) -> None:
        """Lets what comes through."""
        if self.listener is None:
            self.listener = socket.create_server(("127.0.0.1", self.port))
            threading.Thread(target=self._accept, args=(self.listener,), daemon=True).start()
        self.flows.set()

    def cut(self) -> None:
        """Ends all connections; new ones are refused."""
        ended, self.listener = [*self.connections, self.listener], None
        for each in ended:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def mute(self) -> None:
        """Keeps all connections and takes new ones, and lets nothing through."""
        self.flows.clear()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self.target))
                except OSError:
                    near.close()
                    continue
                self.connections |= {near, far}
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._forward, args=(source, sink), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while part := source.recv(1 << 16):
                self.flows.wait()
                sink.sendall(part)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
            self.connections.discard(each)


def give(words: list[str], folder: Path, name: str) -> None:
    """Gives a command of `hf-fedmoe`, in this process."""
    os.chdir(folder)
    log = os.open(f"{name}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    command(words)


class Federation:
    """The commands of a federation, each with a log in its folder."""

    def __init__(self, folder: Path, port: int):
        self.folder, self.port = folder, port
        self.running: dict[str, Any] = {}
        self.restarts = 0

    def start(self, name: str) -> None:
        """Gives a command."""
        words = ["server", "federation.yaml", "--port", str(self.port)]
        if name != "server":
            place = str(NODES.index(name))
            words = ["client", "--superlink", f"127.0.0.1:{self.port + 1}", "--data", f"{name}.csv"]
            words += ["--folder", name, "--client", place]
        self.running[name] = FORKS.Process(target=give, args=(words, self.folder, name))
        self.running[name].start()

    def revive(self) -> None:
        """Gives the commands again that have ended, but for a server that is through."""
        for name, process in list(self.running.items()):
            if process.exitcode is not None and not self.through:
                self.restarts += 1
                self.start(name)

    @property
    def through(self) -> bool:
        """Tells whether the server's command has ended well."""
        return self.running["server"].exitcode == 0

    @property
    def rounds(self) -> int:
        """Rounds of which there is a checkpoint."""
        found = [int(path.name.rpartition("-")[2]) for path in (self.folder / "run").glob("checkpoint-*")]
        return max(found, default=0)

    def processes(self, name: str) -> dict[int, str]:
        """Names the processes that a command has started, and itself, by their ids."""
        children, names = dict[int, list[int]](), dict[int, str]()
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, IndexError, ValueError):
                state, parent = (path / "stat").read_text().rpartition(")")[2].split()[:2]
                words = [Path(os.fsdecode(word)).name for word in (path / "cmdline").read_bytes().split(b"\0")]
                if state != "Z":
                    children.setdefault(int(parent), []).append(int(path.name))
                    names[int(path.name)] = next((w for w in words if w.startswith(("flower-", "flwr"))), "hf-fedmoe")
        found, new = dict[int, str](), [self.running[name].pid]
        while new:
            pid = new.pop()
            if pid in names:
                found[pid] = names[pid]
                new += children.get(pid, [])
        return found

    def stop(self) -> None:
        """Ends everything."""
        for name, process in self.running.items():
            left = self.processes(name)
            process.terminate()
            process.join(40)
            process.kill()
            for pid in left:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)


def kill_processes(federation: Federation, name: str, chance: random.Random) -> str:
    """Kills one process of a command, or all of them as a power cut would; says which."""
    found = federation.processes(name)
    if chance.random() < 0.5:
        chosen, words = list(found), "all processes"
    else:
        # Flower's executor is no choice: killed alone it leaves a SuperNode that waits for it without end.
        chosen = [chance.choice(sorted(pid for pid, name in found.items() if name != EXECUTOR))]
        words = found[chosen[0]]
    for pid in chosen:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return f"{words} of {name}"


def kill_link(link: Link, seconds: float, chance: random.Random) -> str:
    """Cuts the link, or makes it mute, for some seconds."""
    way = chance.choice([link.cut, link.mute])
    way()
    time.sleep(seconds)
    link.open()
    return f"the link ({way.__name__}, {seconds:.0f} s)"


def disturbed(options: argparse.Namespace, folder: Path, chance: random.Random) -> str:
    """Runs a federation whose rounds are disturbed; returns the outcome in words."""
    federation, link = Federation(folder, options.port), Link(options.port + 1, options.port)
    moments = sorted(chance.sample(range(options.kills + 1), options.kills))
    kills = dict.fromkeys(options.who, 0)
    try:
        for name in ("server", *NODES):
            federation.start(name)
        for moment in moments:
            if not wait_until(lambda m=moment: federation.rounds >= m or federation.through, federation, options):
                return f"STUCK after kills {kills}, in round {federation.rounds + 1}"
            time.sleep(chance.uniform(0, options.spread))
            federation.revive()
            if federation.through:
                break
            away, begun, who = chance.uniform(0, options.away), federation.rounds + 1, chance.choice(options.who)
            if who == "link":
                killed = kill_link(link, away, chance)
            else:
                killed = kill_processes(federation, "server" if who == "server" else chance.choice(NODES), chance)
                time.sleep(away)
            kills[who] += 1
            print(f"  {time.strftime('%H:%M:%S')} round {begun}: {killed}, again after {away:.0f} s", flush=True)
        if not wait_until(lambda: federation.through, federation, options):
            return f"STUCK after kills {kills}, in round {federation.rounds + 1}"
    finally:
        federation.stop()
        link.cut()
    missing, same = compared(folder)
    absent = ", ".join(f"{NODES[place]} in round {r + 1}" for r, place in sorted(missing)) or "nobody"
    return f"kills {kills}, {federation.restarts} commands given again, missing: {absent}; {same}"


def wait_until(reached: Callable[[], bool], federation: Federation, options: argparse.Namespace) -> bool:
    """Waits, and starts again what has ended; `False` if no round ends for `options.patience` seconds."""
    rounds, since = federation.rounds, time.monotonic()
    while not reached():
        if federation.rounds != rounds:
            rounds, since = federation.rounds, time.monotonic()
        if time.monotonic() - since > options.patience:
            return False
        federation.revive()
        time.sleep(1)
    return True


class Direct:
    """A link in one process, whose nodes answer at once, but for those that are missing in a round."""

    pause = 0.0

    def __init__(self, nodes: list[Node], missing: set[tuple[int, int]]):
        self.of, self.missing, self.came = nodes, missing, list[Answer]()

    def nodes(self) -> set[int]:
        return set(range(len(self.of)))

    def send(self, node: int, kind: str, pieces: Iterable[bytes]) -> str:
        message, name = Message.unpack(b"".join(pieces)), f"{len(self.came)}-{time.monotonic_ns()}"
        gone = (message.facts.get("round"), node) in self.missing
        answer = Message("failed", {"fault": "missing"}) if gone else self.of[node].answer(message)
        self.came.append(Answer(name, answer.pack()))
        return name

    def receive(self) -> list[Answer]:
        came, self.came = self.came, []
        return came

    def forget(self, message_id: str) -> None:
        pass


def compared(folder: Path) -> tuple[set[tuple[int, int]], str]:
    """Reads from the server's log who was missing, by round (from 0) and client, and says whether bits are equal."""
    log = (folder / "server.log").read_text()
    missing = {(int(r) - 1, int(c)) for r, c in re.findall(r"Round (\d+) goes on without client (\d)", log)}
    return missing, "bits equal" if bits_equal(folder, missing) else "BITS DIFFER"


def bits_equal(folder: Path, missing: set[tuple[int, int]]) -> bool:
    """Tells whether a run ended with the model of one in which the same clients were missing, and nothing happened."""
    nodes = []
    for place, name in enumerate(NODES):
        own, data = folder / "undisturbed" / name, str(folder / f"{name}.csv")

        def make(sent: dict, own: Path = own, data: str = data) -> object:
            return make_node_trainer(sent, own, lambda columns: client_rows(data, columns))

        nodes.append(Node(own, make, place))
    told = {"output_dir": str(folder / "undisturbed" / "run")}
    with contextlib.chdir(folder), contextlib.redirect_stdout(sys.stderr):  # where the model is
        trainer = make_server_trainer("federation.yaml", Direct(nodes, missing), told)
        trainer.train()
    trainer.save_model()
    ours, theirs = (load_file(place / "model.safetensors") for place in (folder / "run", Path(told["output_dir"])))
    return ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    who = ("node", "server", "link")
    parser.add_argument("--who", choices=who, nargs="+", default=who, help="one of them is killed each time")
    parser.add_argument("--kills", type=int, default=20, help="with each method, in as many rounds and two more")
    parser.add_argument("--methods", nargs="+", default=["fedavg", "fedmoe"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--spread", type=float, default=15.0, help="seconds after a round's begin in which it is")
    parser.add_argument("--away", type=float, default=10.0, help="most seconds until it is started again")
    parser.add_argument("--patience", type=float, default=900.0, help="seconds without a round that count as stuck")
    parser.add_argument("--round-timeout", type=float, default=600.0)
    parser.add_argument("--min-clients", type=int, default=2, help="1: rounds go on without who is missing")
    parser.add_argument("--port", type=int, default=8450)
    parser.add_argument("--folder", type=Path, help="kept; otherwise the runs are deleted")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which has all processes stopped on the way out
    logging.set_verbosity_error()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    FORKS.set_forkserver_preload(["hf_fedmoe.cli", "hf_fedmoe.deployment.launching", "on_the_wire"])
    for method in options.methods:
        chance = random.Random(json.dumps([options.seed, *options.who, method]))
        print(f"{method}:", flush=True)
        with tempfile.TemporaryDirectory() as temporary:
            folder = (options.folder or Path(temporary)).resolve() / method
            folder.mkdir(parents=True)
            with contextlib.redirect_stdout(sys.stderr):
                write_files(folder, 1, 32, 1)
            routed = ROUTED if method == "fedmoe" else ""
            told = vars(options) | {"method": method, "rounds": options.kills + 2, "routed": routed}
            (folder / "federation.yaml").write_text(FEDERATION.format(**told))
            print(f"  {disturbed(options, folder, chance)}", flush=True)


if __name__ == "__main__":
    main()
