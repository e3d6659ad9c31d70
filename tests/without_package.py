"""Checkpoints loaded by their own code, in a process that does not find this package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor


# Runs with `-I` (no PYTHONPATH, no working directory on the path); an installed package is hidden as well.
LOAD = """
import json, sys
sys.modules["hf_fedmoe"] = None
import torch
from transformers import AutoModelForSequenceClassification

batch = torch.tensor(json.loads(sys.argv[1]))
for path in sys.argv[3:]:
    model = AutoModelForSequenceClassification.from_pretrained(path, trust_remote_code=True)
    assert type(model).__module__.startswith(sys.argv[2]), type(model)
    with torch.no_grad():
        print("LOGITS", json.dumps(model(batch).logits.tolist()))
    if sys.argv[2] != "transformers.":  # what it does with an adapter is its own affair
        model.save_pretrained(path + "/again")
"""


def logits_without_package(
    folders: list[Path], input_ids: Tensor, cache: Path, kind: str = "transformers_modules."
) -> list[Tensor]:
    """
    The logits of each checkpoint, which is also saved again to its subfolder `again`. The module of a model's class
    begins with `kind`: that of `transformers` saves nothing again.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(cache)}
    command = [sys.executable, "-I", "-c", LOAD, json.dumps(input_ids.tolist()), kind, *map(str, folders)]
    result = subprocess.run(command, cwd=cache.parent, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    lines = [line.removeprefix("LOGITS ") for line in result.stdout.splitlines() if line.startswith("LOGITS")]
    return [torch.tensor(json.loads(line)) for line in lines]
