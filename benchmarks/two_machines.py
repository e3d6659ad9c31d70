"""
A recipe on two machines, which are network namespaces of this one with a cable between them, against the same recipe
in two processes of one machine: whether both end with the same bits. Needs Linux, `ip` and root; minutes of two cores.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from hashlib import sha256
from pathlib import Path


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "three_hospitals"))
from namespaces import ADDRESSES, SERVER, inside, two_machines  # noqa: E402


LAUNCHER = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
CONFIGURATIONS = ROOT / "recipes" / "accelerate_configs"
# On CPUs gloo would connect at the address of the machine's own name, which may be 127.0.0.1: it is told the card.
CARD = {"GLOO_SOCKET_IFNAME": "cable"}
ALL = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
SMALL = {
    "num_clients": 4,
    "clients_per_round": 4,
    "examples_per_client": 16,
    "max_train_examples": 400,
    "reserved_size": 32,
    "validation_size": 32,
    "max_test_examples": 32,
    "max_length": 16,
    "rounds": 2,
    "gate_epochs": 1,
    "final_expert_epochs": 1,
    "eval_strategy": "no",
}


def start(before: list[str], configuration: list[str], output_dir: Path, **variables: str) -> subprocess.Popen:
    """Starts a launcher of the recipe."""
    settings = [f"--{name}={value}" for name, value in (SMALL | {"output_dir": output_dir}).items()]
    words = [*before, *LAUNCHER, *configuration, str(ROOT / "recipes" / "yelp_gpt2.py"), *settings]
    return subprocess.Popen(words, env={**os.environ, **ALL, **variables})


def digests(folder: Path) -> dict[str, str]:
    """Hashes all models and states that a run has written."""
    files = sorted(folder.rglob("*.safetensors"))
    return {str(file.relative_to(folder)): sha256(file.read_bytes()).hexdigest() for file in files}


def finished(processes: list[subprocess.Popen]) -> None:
    """Waits for launchers, which must end well."""
    if codes := [code for code in [process.wait() for process in processes] if code]:
        sys.exit(f"a launcher ended with the code {codes[0]}")


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        two, one = Path(temporary, "two"), Path(temporary, "one")
        with two_machines():
            shared = [str(CONFIGURATIONS / "multi_node.yaml"), "--num_processes", "2"]
            shared += ["--main_process_ip", ADDRESSES[SERVER], "--machine_rank"]
            finished([start(inside(n), [*shared, str(r)], two, **CARD) for r, n in enumerate(ADDRESSES)])
        finished([start([], [str(CONFIGURATIONS / "cpu_2.yaml")], one)])
        found = {"two machines": digests(two), "one machine": digests(one)}
    print(json.dumps(found, indent=2))
    print("same bits" if len({str(each) for each in found.values()}) == 1 else "OTHER BITS")


if __name__ == "__main__":
    main()
