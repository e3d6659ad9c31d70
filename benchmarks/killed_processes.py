"""
Kills of a federation's own processes, nodes, server and link, at random moments: as `killed_moments.py`, with sockets
of this machine in the place of Flower's processes, so that many kills take little time.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import queue
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable
from multiprocessing.connection import Client, Listener
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from killed_moments import FEDERATION, NODES, ROUTED, compared
from on_the_wire import write_files
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from hf_fedmoe.deployment import Answer, Node, make_node_trainer, make_server_trainer
from hf_fedmoe.deployment.client_rows import client_rows
from hf_fedmoe.deployment.relay import FAMILY, STOP, serve


FORKS = multiprocessing.get_context("forkserver")
CUT = Path("cut")  # while this file is there nothing comes through


class SocketLink:
    """A link to processes of this machine, which are known by their ids; each message has a connection."""

    pause = 0.1

    def __init__(self) -> None:
        self.came: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self.sockets: dict[int, str] = {}
        self.sent = 0

    def nodes(self) -> set[int]:
        self.sockets = {}
        for name in () if CUT.exists() else NODES:
            with contextlib.suppress(OSError, ValueError):
                pid = int(Path(f"{name}.pid").read_text())
                if Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    self.sockets[pid] = f"{name}-{pid}"
        return set(self.sockets)

    def send(self, node: int, kind: str, pieces: Iterable[bytes]) -> str:
        if node not in self.sockets or CUT.exists():
            raise ConnectionError(f"process {node} is gone")
        self.sent += 1
        threading.Thread(
            target=self._ask, args=(str(self.sent), self.sockets[node], list(pieces)), daemon=True
        ).start()
        return str(self.sent)

    def _ask(self, name: str, socket: str, pieces: list[bytes]) -> None:
        answered = bytearray()
        try:
            with Client(socket, FAMILY) as connection:
                for piece in [*pieces, STOP]:
                    connection.send_bytes(piece)
                while piece := connection.recv_bytes():
                    answered += piece
            if CUT.exists():
                raise ConnectionError("the link is cut")
        except (OSError, EOFError) as error:
            self.came.put(Answer(name, None, repr(error)))
        else:
            self.came.put(Answer(name, answered))

    def receive(self) -> list[Answer]:
        came = []
        with contextlib.suppress(queue.Empty):
            while True:
                came.append(self.came.get_nowait())
        return came

    def forget(self, message_id: str) -> None:
        pass


def run_process(folder: str, name: str) -> None:
    """Is the server or a node until it is through or killed."""
    os.chdir(folder)
    log = os.open(f"{name}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if name == "server":
        trainer = make_server_trainer("federation.yaml", SocketLink())
        trainer.train(resume_from_checkpoint=get_last_checkpoint("run") if Path("run").is_dir() else None)
        trainer.save_model()
        return
    own, socket = Path(folder, name), f"{name}-{os.getpid()}"

    def make(sent: dict[str, Any]) -> Any:
        return make_node_trainer(sent, own, lambda columns: client_rows(f"{name}.csv", columns))

    with Listener(socket, FAMILY) as listener:
        Path(f"{name}.new").write_text(str(os.getpid()))
        os.replace(f"{name}.new", f"{name}.pid")
        forever = SimpleNamespace(wait=threading.Event().wait)
        serve(Node(own, make, NODES.index(name)), Path(socket), forever, listener)


def disturbed(folder: Path, options: argparse.Namespace, kills: int, chance: random.Random) -> tuple[int, str]:
    """Runs a federation with at most so many kills; returns how many there were, and the outcome in words."""
    running: dict[str, Any] = {}
    count: Counter[str] = Counter()

    def start(name: str) -> None:
        running[name] = FORKS.Process(target=run_process, args=(str(folder), name), daemon=True)
        running[name].start()

    def through(seconds: float) -> bool:
        running["server"].join(seconds)
        return running["server"].exitcode == 0

    def rounds() -> int:
        found = [int(path.name.rpartition("-")[2]) for path in (folder / "run").glob("checkpoint-*")]
        return max(found, default=-1)

    def goes_on() -> bool:
        """Waits for the next round's end, so that each kill finds a federation at work, and some seconds more."""
        before, until = rounds(), time.monotonic() + options.patience
        while running["server"].exitcode is None and rounds() == before and time.monotonic() < until:
            time.sleep(0.1)
        return rounds() != before and not through(chance.uniform(0, options.spread))

    try:
        for name in ("server", *NODES):
            start(name)
        while sum(count.values()) < kills and goes_on():
            who = chance.choice(options.who)
            name = chance.choice(NODES) if who == "node" else who
            if who == "link":
                (folder / CUT).touch()
                time.sleep(chance.uniform(0, options.away))
                (folder / CUT).unlink()
            else:
                running[name].kill()
                running[name].join()
                time.sleep(chance.uniform(0, options.away))
                start(name)
            count[who] += 1
        if not through(options.patience):
            return sum(count.values()), f"{dict(count)}: STUCK, or ended with {running['server'].exitcode}"
    finally:
        for process in running.values():
            process.kill()
    missing, same = compared(folder)
    return sum(count.values()), f"{dict(count)}: {same}, {len(missing)} missing (client, round) {sorted(missing)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    who = ("node", "server", "link")
    parser.add_argument("--who", choices=who, nargs="+", default=who, help="one of them is killed each time")
    parser.add_argument("--kills", type=int, default=60, help="with each method, in as many runs as it takes")
    parser.add_argument("--methods", nargs="+", default=["fedavg", "fedmoe"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--spread", type=float, default=6.0, help="most seconds from the end of a round to a kill")
    parser.add_argument("--away", type=float, default=3.0, help="most seconds until it is started again")
    parser.add_argument("--patience", type=float, default=600.0, help="seconds for the rest of a run")
    parser.add_argument("--round-timeout", type=float, default=600.0)
    parser.add_argument("--min-clients", type=int, default=2, help="1: rounds go on without who is missing")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    logging.set_verbosity_error()
    FORKS.set_forkserver_preload(["killed_processes"])
    for method in options.methods:
        chance, done = random.Random(json.dumps([options.seed, *options.who, method])), 0
        while done < options.kills:
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary)
                with contextlib.redirect_stdout(sys.stderr):
                    write_files(folder, 1, 32, 1)
                told = vars(options) | {"method": method, "routed": ROUTED if method == "fedmoe" else ""}
                (folder / "federation.yaml").write_text(FEDERATION.format(**told))
                count, outcome = disturbed(folder, options, options.kills - done, chance)
                print(f"{time.strftime('%H:%M:%S')} {method}, {outcome}", flush=True)
                if not count:
                    break
                done += count


if __name__ == "__main__":
    main()
