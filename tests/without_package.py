"""Checkpoints loaded by their own code, in a process that does not find this package."""

import atexit
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor


# Runs with `-I` (no PYTHONPATH, no working directory on the path); an installed package is hidden as well. To import
# transformers takes longer than to load all that the tests load: that is done once, and each script runs in a fork,
# with a folder of its own for the code of checkpoints. Nothing is computed before a fork: torch has no threads yet.
SERVE = """
import json, os, signal, sys, traceback
sys.modules["hf_fedmoe"] = None
import peft
import transformers.dynamic_module_utils
from transformers import AutoImageProcessor, AutoModel, BertModel, GPT2Model, ResNetModel, pipeline


def run(script, arguments, cache, folder):
    os.chdir(folder)
    for number, name in ((1, "stdout.txt"), (2, "stderr.txt")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    signal.alarm(300)
    transformers.dynamic_module_utils.HF_MODULES_CACHE = cache
    sys.argv = ["-c", *arguments]
    status = 1
    try:
        exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


answers = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        run(*json.loads(line))
    print(os.waitpid(child, 0)[1], file=answers, flush=True)
"""

LOAD = """
import json, sys
import torch
from transformers import AutoModelForSequenceClassification

batch = torch.tensor(json.loads(sys.argv[1]))
for path in sys.argv[3:]:
    model = AutoModelForSequenceClassification.from_pretrained(path, trust_remote_code=True)
    assert type(model).__module__.startswith(sys.argv[2]), type(model)
    with torch.no_grad():
        print("RESULT", json.dumps(model(batch).logits.tolist()))
    if sys.argv[2] != "transformers.":  # what it does with an adapter is its own affair
        model.save_pretrained(path + "/again")
"""


@functools.cache
def _server() -> subprocess.Popen:
    """One for all tests of this process, with which it ends."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    server = subprocess.Popen([sys.executable, "-I", "-c", SERVE], env=environment, **pipes)

    def stop() -> None:
        server.stdin.close()
        server.wait()
        server.stdout.close()

    atexit.register(stop)
    return server


def results_without_package(script: str, arguments: list[str], cache: Path) -> list:
    """
    Runs a script with these arguments, the package hidden, and gives what it prints as JSON after `RESULT `. The code
    of checkpoints is written to `cache`, which has to be there for no other script, and the output beside it.
    """
    folder, server = cache.parent, _server()
    print(json.dumps([script, arguments, str(cache), str(folder)]), file=server.stdin, flush=True)
    status = server.stdout.readline()
    assert status == "0\n", f"status {status!r}: " + (folder / "stderr.txt").read_text()
    lines = (folder / "stdout.txt").read_text().splitlines()
    return [json.loads(line.removeprefix("RESULT ")) for line in lines if line.startswith("RESULT ")]


def logits_without_package(
    folders: list[Path], input_ids: Tensor, cache: Path, kind: str = "transformers_modules."
) -> list[Tensor]:
    """
    The logits of each checkpoint, which is also saved again to its subfolder `again`. The module of a model's class
    begins with `kind`: that of `transformers` saves nothing again.
    """
    arguments = [json.dumps(input_ids.tolist()), kind, *map(str, folders)]
    return [torch.tensor(logits) for logits in results_without_package(LOAD, arguments, cache)]
