"""Settings from YAML and from the command line to an experiment and the arguments of its runs."""

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum
from itertools import pairwise
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from ..training import FedMoETrainingArguments
from .experiment import Experiment
from .yaml_files import read_yaml


TRUTHS = dict.fromkeys(("yes", "true", "on", "y", "t", "1"), True)
TRUTHS |= dict.fromkeys(("no", "false", "off", "n", "f", "0"), False)
EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
E = TypeVar("E", bound=Experiment)
# numpy takes no others.
LARGEST_SEED = 2**32 - 1


@dataclass
class Setting:
    """A setting's type, and the values there are when these can be listed."""

    hint: Any
    choices: tuple = ()


def settings_of(*classes: type) -> dict[str, Setting]:
    """The settings that some data classes have."""
    found = {}
    for part in classes:
        hints = get_type_hints(part)
        for field in dataclasses.fields(part):
            if field.init:
                found[field.name] = Setting(hints[field.name], tuple(field.metadata.get("choices", ())))
    return found


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of a message about a name that there is not: those that may have been meant, and all of a few."""
    names = list(names)
    near = get_close_matches(name.lower().replace("-", "_"), names)
    listed = ", ".join(names) if len(names) <= 60 else ""
    if near:
        return f": is it {' or '.join(near)}?" + (f" There are {listed}." if len(near) < len(names) and listed else "")
    return f": choose from {listed}." if listed else "."


def typed(name: str, value: Any, setting: Setting) -> Any:
    """
    A value as its setting wants it: a number that was written as a text (`1e-1`), one value in the place of a list.

    Args:
        name (`str`): The setting's, for the message.
        value: From YAML, from Python, or the text of a command line.
        setting ([`Setting`]): What it shall become. A type that no text can be is left to who reads it.

    Raises:
        `ValueError`: When it is of another type, or NaN, or infinite.
    """
    kinds = list(get_args(setting.hint)) if get_origin(setting.hint) in (Union, UnionType) else [setting.hint]
    if NoneType in kinds:
        kinds.remove(NoneType)
        if value is None or (str not in kinds and value in ("none", "null")):
            return None
    choices = setting.choices
    if enums := [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum)]:
        choices = tuple(member.value for member in enums[0])
        if value is False:
            value = "no"  # which YAML 1.1 takes for False
    elif get_origin(kinds[0]) is Literal:
        choices = get_args(kinds[0])
    if value is None:
        raise ValueError(f"`{name}` is empty: give {EXPECTED.get(kinds[0], 'a value')}, or leave it out.")
    if choices:
        value = value.value if isinstance(value, Enum) else value
        if value not in choices:
            raise ValueError(f"`{name}` is {value!r}{nearest(str(value), map(str, choices))}")
        return value
    if len(kinds) > 1:
        return value
    return _as(name, value, kinds[0])


def _as(name: str, value: Any, kind: Any) -> Any:
    found: bool | int | float | str | None = None
    if get_origin(kind) in (list, tuple):
        if isinstance(value, dict):
            raise ValueError(f"`{name}` is {value!r}: give a list, [first, second].")
        items = value if isinstance(value, list | tuple) else [value]
        element = Setting(get_args(kind)[0])
        return get_origin(kind)(typed(name, item, element) for item in items)
    if kind is bool:
        found = value if isinstance(value, bool) else TRUTHS.get(str(value).lower())
    elif kind in (int, float):
        found = _number(value)
        if kind is float and found is not None:
            found = float(found)
            if not math.isfinite(found):
                raise ValueError(f"`{name}` is {found}: give a finite number.")
        elif isinstance(found, float):
            found = int(found) if found.is_integer() else None
    elif kind is str:
        if isinstance(value, dict):
            found = json.dumps(value)
        elif isinstance(value, str | Real) and not isinstance(value, bool):
            found = str(value)
    else:
        return value
    if found is None:
        raise ValueError(f"`{name}` is {value!r}: give {EXPECTED[kind]}.")
    return found


def _number(value: Any) -> int | float | None:
    if isinstance(value, bool) or not isinstance(value, str | Real):
        return None
    if isinstance(value, Real):
        return int(value) if isinstance(value, Integral) else float(value)
    for read in (int, float):
        try:
            return read(value)
        except ValueError:
            continue
    return None


def typed_settings(given: dict[str, Any], known: dict[str, Setting], otherwise: Iterable[str] = ()) -> dict[str, Any]:
    """
    All of `given` as their settings want them.

    Args:
        given (`dict`): Values by name.
        known (`dict[str, Setting]`): What there is.
        otherwise (`Iterable[str]`, *optional*): Further names that may have been meant.

    Raises:
        `ValueError`: When a setting is unknown, with the nearest name, or its value is of another type.
    """
    for name in given:
        if name not in known:
            raise ValueError(f"There is no setting {name!r}{nearest(name, [*known, *otherwise])}")
    return {name: typed(name, value, known[name]) for name, value in given.items()}


def read_words(words: list[str]) -> dict[str, Any]:
    """
    Reads `--name value`, `--name=value`, `--name first second`, `--name` (true) and `--no_name` (false).

    Returns:
        `dict`: Texts, or lists of them, by name; the last one where a name stands twice.
    """
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    flags = [place for place, word in enumerate(words) if word.startswith("--")]
    if words and (not flags or flags[0] != 0):
        raise ValueError(f"{words[0]!r} follows no setting: write --name value.")
    given: dict[str, str | list[str] | bool] = {}
    for start, stop in pairwise([*flags, len(words)]):
        name, values = words[start][2:].replace("-", "_"), words[start + 1 : stop]
        if values:
            given[name] = values[0] if len(values) == 1 else values
        else:
            given[name.removeprefix("no_")] = not name.startswith("no_")
    return given


def read_preset(settings_file: Path, name: str, asked_by: str = "--preset") -> dict[str, Any]:
    """
    The settings of one preset of a recipe's YAML.

    Args:
        settings_file (`Path`): The YAML.
        name (`str`): The preset.
        asked_by (`str`, *optional*, defaults to `"--preset"`): Where the name stands, for the message.
    """
    presets = read_yaml(settings_file)
    if name not in presets:
        raise ValueError(f"`{asked_by}` is {name!r}: {settings_file.name} has {', '.join(presets)}.")
    if not isinstance(presets[name], dict):
        raise ValueError(f"{settings_file.name}: the preset {name!r} is {presets[name]!r}, write `name: value` lines.")
    return {"preset_name": name, "output_dir": f"runs/{settings_file.stem}", **presets[name]}


def parse_settings(
    experiment_class: type[E], settings: dict[str, Any], told: dict[str, Any] | None = None
) -> tuple[E, FedMoETrainingArguments]:
    """
    An experiment and the arguments of its runs from settings.

    Args:
        experiment_class (`type[Experiment]`): What to make.
        settings (`dict`): Any of its fields and of [`FedMoETrainingArguments`]. Those under `with_lora` take the
            place of others where experts are adapters, which learn at other rates than whole models.
        told (`dict`, *optional*): Settings that go before all others: those of the command line.

    Raises:
        `ValueError`: When a setting is unknown, of another type or out of its range.
    """
    known = settings_of(experiment_class, FedMoETrainingArguments)
    told = typed_settings(told or {}, known)
    settings = dict(settings)
    with_lora = typed_settings(settings.pop("with_lora", {}), known)
    settings = typed_settings(settings, known) | told
    if settings.get("peft") == "lora":
        settings |= with_lora | told
    for name in ("dataset", "model"):
        if name not in settings:
            raise ValueError(f"There is no {name!r} among the settings: name one, or a recipe that does.")
    for name in ("seed", "client_draw_seed", "data_seed"):
        if not 0 <= (settings.get(name) or 0) <= LARGEST_SEED:
            raise ValueError(f"`{name}` is {settings[name]}: give a whole number from 0 to {LARGEST_SEED}.")
    experiment = experiment_class(**_those_of(experiment_class, settings))
    args = FedMoETrainingArguments(**_those_of(FedMoETrainingArguments, settings))
    if not experiment.is_watched and args.eval_strategy != "no":
        raise ValueError(
            f"`validation_size` is 0, but `eval_strategy` is {IntervalStrategy(args.eval_strategy).value!r}: hold out "
            "some examples, or set `eval_strategy` to no."
        )
    return experiment, args


def training_arguments(told: dict[str, Any]) -> dict[str, Any]:
    """
    Reads fields of transformers' own `TrainingArguments` from texts, as [`read_words`] returns them.

    Args:
        told (`dict`): Texts by name.

    Raises:
        `ValueError`: When there is no such field, or its value is of another type.
    """
    known = settings_of(TrainingArguments)
    known.pop("output_dir")
    return typed_settings(told, known)


def _those_of(part: type[Experiment | FedMoETrainingArguments], settings: dict[str, Any]) -> dict[str, Any]:
    own = {field.name for field in dataclasses.fields(part)}
    return {name: value for name, value in settings.items() if name in own}
