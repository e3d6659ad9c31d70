"""A kind of comparison: what can be trained, and what is measured of it."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from ..data import FederatedDataset
from ..reporting import Metric
from ..training import FederatedTrainer, FedMoETrainingArguments
from .experiment import Experiment
from .settings import Setting


E = TypeVar("E", bound=Experiment)


class Kind(ABC, Generic[E]):
    """
    A kind of comparison, as the `kind` of its YAML names it.

    Args:
        experiment_class (`type[Experiment]`): By which its settings become data and models.
    """

    # Metrics of a table unless told, of which the first is the one that counts: curves are of it.
    columns: ClassVar[tuple[str, ...]]
    # The method that trains nothing.
    untrained: ClassVar[str]

    def __init__(self, experiment_class: type[E]) -> None:
        self.experiment_class = experiment_class

    @abstractmethod
    def method_names(self) -> tuple[str, ...]:
        """Lists the names of all methods that train something, those of files that were loaded among them."""

    def check_name(self, method: str) -> None:
        """Raises `ValueError` where a method is known, and none of this kind; says nothing of unknown ones."""

    @abstractmethod
    def own_settings(self, method: str) -> dict[str, Setting]:
        """Returns the settings that a method has besides those of all runs."""

    @abstractmethod
    def check_method(self, method: str, experiment: E, args: FedMoETrainingArguments) -> None:
        """Raises `ValueError` when one of a method's settings has another name, type or range."""

    @abstractmethod
    def make_trainer(
        self, method: str, experiment: E, args: FedMoETrainingArguments, data: FederatedDataset, processor: Any
    ) -> FederatedTrainer:
        """Makes a trainer. Equal seeds give every method the same initial weights, clients and draws."""

    def try_trainer(
        self, method: str, experiment: E, args: FedMoETrainingArguments, data: FederatedDataset, processor: Any
    ) -> None:
        """Makes a trainer for nothing but the errors that there are, which takes no training."""
        self.make_trainer(method, experiment, args, data, processor)

    @abstractmethod
    def metrics(self, method: str, experiment: E) -> dict[str, Metric]:
        """Returns what a run leaves: what can be a column of a table."""

    @abstractmethod
    def part_names(self, method: str, experiment: E) -> list[str]:
        """Lists the parts of a method's model that have metrics of their own, which can be rows below its own."""

    def remedy(self, part: str) -> str:
        """Says what a part needs that no row will have, if it is known to need something."""
        return ""

    @abstractmethod
    def measure_untrained(self, experiment: E, data: FederatedDataset, processor: Any) -> dict[str, float]:
        """Measures what trains nothing."""

    @abstractmethod
    def measure(
        self, method: str, trainer: FederatedTrainer, experiment: E, data: FederatedDataset, processor: Any
    ) -> dict[str, float]:
        """Measures a trained model; the names are those of [`~Kind.metrics`]."""

    @abstractmethod
    def curve(self, trainer: FederatedTrainer, processor: Any) -> list[tuple[int, float]]:
        """Returns the metric that counts on the validation set after those rounds in which there was a look at it."""


def evaluations(trainer: FederatedTrainer, name: str) -> list[tuple[int, float]]:
    """Returns what evaluations have logged by this name, with their rounds; that before the first is left out."""
    entries = [entry for entry in trainer.state.log_history if name in entry]
    return [(int(entry["step"]), entry[name]) for entry in entries if entry["step"]]


def costs_of_rounds(trainer: FederatedTrainer) -> dict[str, float]:
    """Measures what a mean round sent and took, by the names of [`~reporting.COSTS`]."""
    rounds = [entry for entry in trainer.state.log_history if "seconds_server" in entry]
    seconds = [sum(value for name, value in entry.items() if name.startswith("seconds_")) for entry in rounds]
    return {
        "megabytes_up": float(np.mean([entry.get("bytes_up", np.nan) for entry in rounds])) / 1e6,
        "megabytes_down": float(np.mean([entry.get("bytes_down", np.nan) for entry in rounds])) / 1e6,
        "seconds": float(np.mean(seconds)),
    }
