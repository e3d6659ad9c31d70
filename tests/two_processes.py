"""Starting two processes, and holding what each of their runs ends with against the run of one."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.multiprocessing import start_processes

from tests.tiny_federation import assert_equal_states, state, timeless


ROOT = Path(__file__).parents[1]
PROCESSES = 2


def index_of_this_process():
    return int(os.environ.get("RANK", 0))


def join_group(index, port):
    """This process is one of those of a launch."""
    os.environ |= {
        "RANK": str(index),
        "LOCAL_RANK": str(index),
        "WORLD_SIZE": str(PROCESSES),
        "LOCAL_WORLD_SIZE": str(PROCESSES),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    torch.set_num_threads(1)


def launch(process, folder, names, seconds=600):
    """`process(index, port, folder, names)` in each process; nothing that it started outlives this."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = start_processes(process, (port, folder, names), PROCESSES, join=False, start_method="spawn")
    deadline = time.monotonic() + seconds
    try:
        while not started.join(timeout=5):
            assert time.monotonic() < deadline, "the processes hang"
    finally:
        for child in started.processes:
            child.kill()
            child.join()


def run_to_its_end(command, seconds=120):
    """Exit code and output of a launcher; nothing that it started outlives this."""
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with subprocess.Popen(command, env=variables, start_new_session=True, **pipes) as launcher:
        try:
            output, _ = launcher.communicate(timeout=seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
    return launcher.returncode, output


def record(run, path):
    save_file(state(run.model), f"{path}.safetensors")
    clients = run.evaluate_clients() if run.federated_dataset.client_test_indices else None
    facts = {
        "log": timeless(run.state.log_history),
        "clients": [clients, [vars(score) for score in run.client_table]],
        "rounds": [[report.clients, report.refused, report.metrics] for report in run.rounds],
    }
    Path(f"{path}.json").write_text(json.dumps(facts))


def assert_same(first, second):
    assert json.loads(Path(f"{first}.json").read_text()) == json.loads(Path(f"{second}.json").read_text())
    assert_equal_states(load_file(f"{first}.safetensors"), load_file(f"{second}.safetensors"))
