"""Prints `--help` of a recipe: its own settings first, those of every `Trainer` last."""

import argparse
import dataclasses
import json
import re
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

from transformers import TrainingArguments

from ..strategies import FedMoESettings
from ..training import FedMoETrainingArguments
from .classifier_experiment import ClassifierExperiment
from .named_strategies import method_names
from .settings import Setting, read_preset, settings_of


FIRST = (
    "compare",
    "dataset",
    "model",
    "rounds",
    "num_clients",
    "clients_per_round",
    "partition",
    "output_dir",
    "seed",
)
MODELS: tuple[str, ...] = (
    "model_config",
    "gate",
    "num_main_experts",
    "num_routed_experts",
    "top_l",
    "num_models",
    "start_epochs",
)
MODELS += ("peft", "rank", "target_modules", "method_settings", "plugin")
LOCAL: tuple[str, ...] = (
    "num_train_epochs",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "learning_rate",
    "optim",
)
LOCAL += ("optim_args", "weight_decay", "lr_scheduler_type", "max_grad_norm", "bf16", "use_cpu", "deepspeed")
LOGS = ("eval_strategy", "eval_steps", "logging_steps", "save_steps", "save_total_limit", "report_to", "disable_tqdm")
# Of settings that `TrainingArguments` explains for steps and for one model.
TEXTS = {
    "output_dir": "Folder of the model, the results, and a folder for each method with its checkpoints.",
    "seed": "Of the clients, the initial weights and the draws.",
    "optim": "The optimizer of local training.",
    "lr_scheduler_type": "The schedule of the learning rate.",
    "eval_strategy": "When the server's model is evaluated: no, steps or epoch, which both are rounds.",
    "eval_steps": "Evaluate every so many rounds.",
}
NAMES = {int: "N", float: "X", bool: "true|false", str: "TEXT"}


def recipe_help(
    experiment_class: type[ClassifierExperiment], settings_file: Path, preset: str = "quick", everything: bool = False
) -> str:
    """
    The settings of a recipe by group, each with the value that it has in a preset.

    Args:
        experiment_class (`type[ClassifierExperiment]`): What the recipe runs.
        settings_file (`Path`): Its YAML.
        preset (`str`, *optional*, defaults to `"quick"`): The preset.
        everything (`bool`, *optional*, defaults to `False`): Whether with all of `TrainingArguments`.
    """
    in_force = read_preset(settings_file, preset)
    known = settings_of(experiment_class, FedMoETrainingArguments)
    fields = {
        field.name: field for part in (FedMoETrainingArguments, experiment_class) for field in dataclasses.fields(part)
    }
    of_fedmoe = [field.name for field in dataclasses.fields(FedMoESettings)]
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    of_experiment = [field.name for field in dataclasses.fields(experiment_class) if field.name != "preset_name"]
    of_federation = [field.name for field in dataclasses.fields(FedMoETrainingArguments)]
    groups = {
        "experts and gate": [name for name in MODELS if name in known],
        "clients, reserved set and test": [name for name in of_experiment if name not in (*FIRST, *MODELS)],
        "federation": [name for name in of_federation if name not in (*inherited, *of_fedmoe, *FIRST)],
        "local training of a client": list(LOCAL),
        "evaluation, logs and checkpoints, by rounds": list(LOGS),
        "Fed-MoE": of_fedmoe,
    }
    if everything:
        shown = {*FIRST, *(name for names in groups.values() for name in names)}
        groups["all other settings of TrainingArguments"] = sorted(known.keys() & inherited - shown)
    parser = argparse.ArgumentParser(
        prog=f"{settings_file.stem}.py",
        usage="%(prog)s [--preset NAME] [--SETTING VALUE ...]",
        description="Trains the methods of --compare on one seed of one experiment, and saves the last one's model. "
        f"Values in brackets are those of the preset {preset!r}.",
        epilog=None if everything else "--help-all shows all other settings of TrainingArguments as well.",
        add_help=False,
    )
    first = parser.add_argument_group("the recipe")
    first.add_argument("--preset", metavar="NAME", help=f"where settings come from: {presets(settings_file)}")
    for title, names in {"the recipe": FIRST, **groups}.items():
        group = first if title == "the recipe" else parser.add_argument_group(title)
        for name in names:
            text = TEXTS.get(name, fields[name].metadata.get("help", ""))
            if name == "compare":
                text += f" There are {', '.join(method_names())}."
            elif name == "partition":
                text += f" One of {', '.join(experiment_class.partitions)}."
            value = _shown(in_force[name] if name in in_force else _default(fields[name]))
            # Fed-MoE's own preset has another name here, since that of the recipe comes first.
            option = "preset_of_method" if name == "preset" else name
            text = " ".join(text.split()) + (f" [{value}]".replace("%", "%%") if value else "")
            group.add_argument(f"--{option}", metavar=_metavar(known[name]), help=text)
    return parser.format_help()


def presets(settings_file: Path) -> str:
    """The presets of a YAML, each with the comment behind its name."""
    found = re.findall(r"^(\w+):[ \t]*(?:#[ \t]*(.*))?$", settings_file.read_text(encoding="utf-8"), re.MULTILINE)
    return "; ".join(f"{name} ({comment.replace(';', ',')})" if comment else name for name, comment in found)


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _shown(value: Any) -> str:
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, list | tuple):
        return " ".join(map(_shown, value))
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else str(value)


def _metavar(setting: Setting) -> str:
    if setting.choices:
        return "|".join(map(str, setting.choices))
    kinds = [kind for kind in get_args(setting.hint) or [setting.hint] if kind is not NoneType]
    if get_origin(setting.hint) is list:
        return f"{NAMES[kinds[0]]} ..."
    if get_origin(kinds[0]) is list:
        return f"{NAMES[get_args(kinds[0])[0]]} ..."
    return NAMES.get(kinds[0], "TEXT" if str in kinds else "VALUE")
