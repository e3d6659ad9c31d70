"""An experiment: from settings to data."""

import json
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Protocol

from datasets.exceptions import DatasetsError

from ..data import FederatedDataset
from .named_strategies import load_plugin


@dataclass
class Experiment(ABC):
    """Data and a model. Lists of names are tried in order: the first that is there is used."""

    dataset: list[str] = field(metadata={"help": "A shipped one, a file, a name in $HF_FEDMOE_DATA, or a Hub id."})
    model: list[str] = field(metadata={"help": "A shipped one, a folder, a name in $HF_FEDMOE_MODELS, or a Hub id."})
    preset_name: str = field(default="quick", metadata={"help": "The block of the YAML that settings came from."})
    method_settings: str = field(
        default="{}", metadata={"help": 'JSON: settings of a method by its name, {"fedprox": {"mu": 0.1}}.'}
    )
    plugin: str | None = field(
        default=None,
        metadata={"help": "A Python file with strategies of your own, methods by their name."},
    )

    # The smallest value of a whole number, and settings that are shares in [0, 1).
    lowest: ClassVar[dict[str, int]] = {}
    shares: ClassVar[tuple[str, ...]] = ()
    # Everything else may change who holds what.
    not_of_data: ClassVar[tuple[str, ...]] = ("preset_name", "plugin", "method_settings")

    def __post_init__(self) -> None:
        """Raises `ValueError` when a setting is out of its range, whatever the data."""
        for name in ("dataset", "model"):
            if not all(vars(self)[name]) or not vars(self)[name]:
                raise ValueError(f"`{name}` is {vars(self)[name]}: give at least one name.")
        for name, lowest in self.lowest.items():
            if vars(self)[name] is not None and vars(self)[name] < lowest:
                raise ValueError(f"`{name}` is {vars(self)[name]}: give at least {lowest}.")
        for name in self.shares:
            if not 0 <= vars(self)[name] < 1:
                raise ValueError(f"`{name}` is {vars(self)[name]}: give a share in [0, 1).")
        for name in ("model_config", "method_settings"):
            if name in vars(self):
                self.read_json(name)
        if self.plugin is not None:
            load_plugin(self.plugin)

    def read_json(self, name: str) -> dict[str, Any]:
        """The dictionary that a setting holds as JSON; raises `ValueError` when it holds none."""
        try:
            found = json.loads(vars(self)[name])
        except json.JSONDecodeError as error:
            raise ValueError(
                f"`{name}` is {vars(self)[name]!r}, which is no JSON ({error}): write '{{\"name\": 1}}'."
            ) from None
        if not isinstance(found, dict):
            raise ValueError(f"`{name}` is {vars(self)[name]}: give names and values, '{{\"name\": 1}}'.")
        return found

    @property
    def data_settings(self) -> dict[str, Any]:
        """The settings that decide what the clients and the server hold."""
        return {name: value for name, value in vars(self).items() if name not in self.not_of_data}

    @property
    @abstractmethod
    def is_watched(self) -> bool:
        """Tells whether there are rows that rounds are evaluated on."""

    @abstractmethod
    def load_processor(self) -> Any:
        """The tokenizer or image processor."""

    def source(self) -> tuple[str, Any]:
        """The first data set of the list that is at hand, and its name."""
        problems = []
        for name in self.dataset:
            try:
                return name, self.load(name)
            except (OSError, ValueError, DatasetsError) as error:
                problems.append(" ".join(str(error).split()))
        raise ValueError("None of the data sets could be loaded. " + " ".join(problems))

    @abstractmethod
    def load(self, name: str) -> Any:
        """Loads rows for training and test; raises a `ValueError` when there is no such data set."""

    @abstractmethod
    def split(self, source: Any, seed: int) -> FederatedDataset:
        """Clients, reserved set, validation and test."""

    def prepare(self, data: FederatedDataset, processor: Any) -> FederatedDataset:
        """Data as the model's collator takes it: as they are."""
        return data

    def hold_out(self, data: FederatedDataset, seed: int) -> FederatedDataset:
        """Clients with test rows of their own, where that is asked for: nobody."""
        return data

    def load_data(self, processor: Any, seed: int) -> tuple[str, FederatedDataset]:
        """The name of the data set that was found, and its clients and server splits, ready for the trainer."""
        name, source = self.source()
        return name, self.hold_out(self.prepare(self.split(source, seed), processor), seed)


class FromPretrained(Protocol):
    """Any class of `transformers` that loads something by its name."""

    def from_pretrained(self, pretrained_model_name_or_path: str, **changes: Any) -> Any: ...


def find_model(names: list[str]) -> str:
    """The first model of the list at hand: shipped, in $HF_FEDMOE_MODELS, or a folder; else the last as a Hub id."""
    for name in names:
        shipped = files("hf_fedmoe") / "assets" / name
        local = Path(os.environ.get("HF_FEDMOE_MODELS", ""), name)
        for folder in (shipped, local if "HF_FEDMOE_MODELS" in os.environ else None, Path(name)):
            if folder is not None and folder.is_dir():
                return str(folder)
    return names[-1]


def load_pretrained(auto_class: FromPretrained, name: str, **changes: Any) -> Any:
    """`auto_class.from_pretrained`, whose errors take many lines and name no remedy of ours."""
    try:
        return auto_class.from_pretrained(name, **changes)
    except (OSError, ValueError) as error:
        shipped = [folder.name for folder in (files("hf_fedmoe") / "assets").iterdir()]
        near = get_close_matches(name, shipped, n=1, cutoff=0.8)
        meant = f"is it {near[0]!r}, which is shipped? " if near else ""
        raise ValueError(
            f"The model {name!r} cannot be loaded: {meant}{' '.join(str(error).split())} It can be a shipped one, a "
            "folder, a name in $HF_FEDMOE_MODELS, or a Hub id."
        ) from error
