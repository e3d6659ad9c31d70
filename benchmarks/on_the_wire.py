"""
Bytes between SuperNodes and SuperLink against the bytes that rounds count, and the most memory that each process has:
FedAvg of a whole GPT-2 of a given size over Flower on this machine. Needs `hf_fedmoe[flower]`.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
from transformers import AutoTokenizer, GPT2Config, GPT2ForSequenceClassification

import hf_fedmoe


COMMAND = [sys.executable, "-m", "hf_fedmoe.cli"]
ASSETS = Path(hf_fedmoe.__file__).parent / "assets"
FEDERATION = """\
model: [model]
method: fedavg
labels: [bad, good]
num_clients: {nodes}
min_clients: {nodes}
clients_per_round: {nodes}
round_timeout: 1800
validation: rows.csv
rounds: {rounds}
max_length: 8
save_strategy: "no"
optim: sgd
use_cpu: true
output_dir: run
"""
NODES = ("north", "south")
KINDS = {
    "flwr-serverapp": "server's app",
    "flower-superlink": "SuperLink",
    "flower-supernode": "SuperNode",
    "flwr-clientapp": "node's app",
    "client": "hf-fedmoe client",
}


class CountingProxy:
    """Forwards what comes to a port to another one, and counts the bytes each way."""

    def __init__(self, port: int, target: int):
        self.target, self.up, self.down = target, 0, 0
        self.listener = socket.create_server(("127.0.0.1", port))
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self.listener.accept()
            try:
                far = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                near.close()
                continue
            for source, sink, way in ((near, far, "up"), (far, near, "down")):
                threading.Thread(target=self._forward, args=(source, sink, way), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        try:
            while part := source.recv(1 << 20):
                sink.sendall(part)
                setattr(self, way, getattr(self, way) + len(part))
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass


def peak_memory(processes: dict[int, tuple[str, int]]) -> None:
    """Takes note of the most resident memory of this process's descendants that are of interest, by their ids."""
    for process in psutil.Process().children(recursive=True):
        try:
            words = process.cmdline()
            status = Path(f"/proc/{process.pid}/status").read_text()
        except (psutil.Error, OSError):
            continue
        names = {Path(word).name for word in words[:5]}
        kind = next((kind for kind in KINDS if kind in names), None)
        if kind is not None and "VmHWM:" in status:
            kilobytes = int(status.split("VmHWM:")[1].split()[0])
            processes[process.pid] = kind, max(kilobytes, processes.get(process.pid, ("", 0))[1])


def enough_memory(least: float) -> bool:
    """Tells whether so many GB of memory can still be had."""
    return psutil.virtual_memory().available > least * 1e9


def write_files(folder: Path, layers: int, width: int, rounds: int, nodes: int = 2) -> int:
    """Writes model, rows and settings; returns the bytes of the model."""
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "gpt2-reviews")
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=width, n_layer=layers, n_head=8, num_labels=2
    )
    model = GPT2ForSequenceClassification(config)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = "text,label\n" + "a fine dress,good\nit tore,bad\n" * 4
    for name in ("rows", *NODES):
        (folder / f"{name}.csv").write_text(rows)
    (folder / "federation.yaml").write_text(FEDERATION.format(rounds=rounds, nodes=nodes))
    return sum(parameter.nbytes for parameter in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--nodes", type=int, choices=(1, 2), default=2)
    parser.add_argument("--least-memory", type=float, default=1.5, help="GB of the machine, under which it stops")
    parser.add_argument("--port", type=int, default=8420)
    options = parser.parse_args()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as temporary:
        folder, processes = Path(temporary), dict[int, tuple[str, int]]()
        size = write_files(folder, options.layers, options.width, options.rounds, options.nodes)
        proxy = CountingProxy(options.port + 1, options.port)
        log, superlink = (folder / "log").open("w"), f"127.0.0.1:{options.port + 1}"
        running = [
            subprocess.Popen(
                [*COMMAND, "client", "--superlink", superlink, "--data", f"{name}.csv", "--folder", name],
                cwd=folder,
                env=environment,
                stdout=log,
                stderr=log,
            )
            for name in NODES[: options.nodes]
        ]
        server = [*COMMAND, "server", "federation.yaml", "--port", str(options.port)]
        running.append(subprocess.Popen(server, cwd=folder, env=environment, stdout=log, stderr=log))
        started = time.monotonic()
        while running[-1].poll() is None:
            peak_memory(processes)
            if not enough_memory(options.least_memory):
                running[-1].terminate()
            time.sleep(0.2)
        seconds = time.monotonic() - started
        for process in running[:-1]:
            process.terminate()
            process.wait()
        if running[-1].returncode:
            sys.stderr.write((folder / "run" / "_flower" / "superlink.log").read_text()[-6000:])
            sys.exit((folder / "log").read_text()[-4000:])
        history = json.loads((folder / "run" / "trainer_state.json").read_text())["log_history"]
    print(f"model {size / 1e6:.1f} MB, {options.nodes} nodes, {options.rounds} rounds, {seconds:.0f} s")
    for way, found in (("up", proxy.up), ("down", proxy.down)):
        wanted = sum(entry.get(f"bytes_{way}", 0) for entry in history)
        print(f"bytes {way}: {found:,} between SuperNodes and SuperLink, {wanted:,} counted, {found / wanted:.4f}")
    for kind, name in KINDS.items():
        found = [kilobytes for each, kilobytes in processes.values() if each == kind]
        print(f"most memory of a {name}: {max(found, default=0) / 1e3:.0f} MB")


if __name__ == "__main__":
    main()
