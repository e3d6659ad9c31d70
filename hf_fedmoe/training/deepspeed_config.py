"""
A run whose clients are trained by DeepSpeed. Only their training knows of it: to `Trainer` and Accelerate this is an
ordinary launch of several processes, so that the server's model is loaded, evaluated and saved as ever.
"""

import copy
import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainingArguments


# What a launcher's configuration sets.
VARIABLE = "ACCELERATE_USE_DEEPSPEED"


def requested_config(deepspeed: str | dict | None) -> dict[str, Any] | None:
    """DeepSpeed's configuration, of an argument (a file, JSON or a dict) or of the launcher; `None` without any."""
    launched = os.environ.get(VARIABLE, "false").lower() == "true"
    if not deepspeed and not launched:
        return None
    if importlib.util.find_spec("deepspeed") is None:
        raise ImportError("DeepSpeed is asked for, but not installed: `pip install hf_fedmoe[deepspeed]`.")
    if not deepspeed:
        from accelerate import DeepSpeedPlugin

        config = DeepSpeedPlugin().deepspeed_config
        # An infinity, which no JSON has.
        return {name: value for name, value in config.items() if name != "steps_per_print"}
    if isinstance(deepspeed, dict):
        return copy.deepcopy(deepspeed)
    return json.loads(deepspeed if deepspeed.lstrip().startswith("{") else Path(deepspeed).read_text())


@contextmanager
def hidden_from_accelerate() -> Iterator[None]:
    """Hides from Accelerate, in a block, that the launcher asks for DeepSpeed."""
    asked = os.environ.pop(VARIABLE, None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ[VARIABLE] = asked


def engine_config(config: dict[str, Any], args: TrainingArguments, mixed_precision: str) -> dict[str, Any]:
    """
    The configuration of the engine. What it repeats of `args` must be `"auto"` or agree, or `ValueError` is raised;
    any other `"auto"` is left to DeepSpeed.

    Args:
        config (`dict`): As the user gives it.
        args ([`~transformers.TrainingArguments`]): Of local training.
        mixed_precision (`str`): What `args` or the launcher ask for: `"no"`, `"bf16"` or `"fp16"`.
    """
    for section in ("optimizer", "scheduler"):
        if section in config:
            raise ValueError(
                f"DeepSpeed's configuration has `{section}`, but each client has a fresh one of the training "
                "arguments: leave it out, and set `optim`, `learning_rate` and `lr_scheduler_type`."
            )
    for name in ("train_batch_size", "train_micro_batch_size_per_gpu"):
        if config.get(name, "auto") != "auto":
            raise ValueError(
                f"DeepSpeed's `{name}` is {config[name]}, but a client's batches have `per_device_train_batch_size` "
                'rows, of which each process takes a share: set it to "auto", or leave it out.'
            )
    known = {"gradient_accumulation_steps": args.gradient_accumulation_steps, "gradient_clipping": args.max_grad_norm}
    for name, value in known.items():
        if config.get(name, "auto") not in ("auto", value):
            raise ValueError(
                f'DeepSpeed\'s `{name}` is {config[name]}, in the training arguments it is {value}: set it to "auto".'
            )
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2, 3):
        raise ValueError(
            f"DeepSpeed's `zero_optimization.stage` is {stage!r}: choose 1, 2 or 3. For clients trained by all "
            'processes without ZeRO leave DeepSpeed out and set client_parallelism="data".'
        )
    if mixed_precision == "fp16" or config.get("fp16", {}).get("enabled") is True:
        raise ValueError("`fp16` would carry its loss scale from one client to the next in DeepSpeed: take `bf16`.")
    enabled = config.get("bf16", {}).get("enabled", "auto")
    own = known | {
        # Of no consequence: batches come from the clients.
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": mixed_precision == "bf16" if enabled == "auto" else enabled},
        "steps_per_print": 2**62,
        # That of the training arguments, whatever it is.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return _without_auto({name: value for name, value in config.items() if name != "train_batch_size"}) | own


def _without_auto(config: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_auto(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if value != "auto"
    }
