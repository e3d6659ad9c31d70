"""An experiment of classifiers: from settings to clients, reserved set and models."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
from peft import PeftConfig
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedModel

from ..data import FederatedDataset, dirichlet, hold_out_client_tests, iid, load_source, predominant, shards
from ..models import EnsemblePreTrainedModel, FedMoEPreTrainedModel, MultiHeadPreTrainedModel
from ..models.configuration_checks import AutoClassifier
from .experiment import Experiment, find_model, load_pretrained


@dataclass
class ClassifierExperiment(Experiment):
    """Labelled data, classifiers and mixtures of them, and what is compared."""

    label_column: str | None = field(default=None, metadata={"help": "Column of labels, when it is not obvious."})
    gate: str = field(default="main_features", metadata={"help": "'main_features', 'adapter' or a model."})
    num_main_experts: int = field(default=1, metadata={"help": "Main experts of the mixture, 0 to 3."})
    num_routed_experts: int = field(default=3, metadata={"help": "K, the routed experts of the mixture."})
    top_l: int = field(default=1, metadata={"help": "L, routed experts per example at inference."})
    partition: str = field(default="predominant", metadata={"help": "Who holds what."})
    dirichlet_alpha: float = field(default=0.3, metadata={"help": "Concentration of the Dirichlet partition."})
    num_clients: int = field(default=10, metadata={"help": "M, the clients of the federation."})
    examples_per_client: int = field(default=300, metadata={"help": "Training examples of a client, at most."})
    share_low: float = field(default=0.55, metadata={"help": "Least share of a client's predominant class."})
    share_high: float = field(default=0.65, metadata={"help": "Largest share of a client's predominant class."})
    reserved_size: int = field(default=500, metadata={"help": "Examples of the server's reserved set."})
    reserved_share: float | None = field(default=None, metadata={"help": "Share of one class in the reserved set."})
    validation_size: int = field(default=500, metadata={"help": "Examples the server model is watched on."})
    max_train_examples: int | None = field(default=None, metadata={"help": "Training rows that are divided (all)."})
    max_test_examples: int = field(default=2000, metadata={"help": "Test examples that are used."})
    client_test_share: float = field(
        default=0.0, metadata={"help": "Share of a client's examples in a test of its own."}
    )
    unseen_share: float = field(default=0.0, metadata={"help": "Share of the clients that take part in no round."})
    start_epochs: int = field(default=0, metadata={"help": "Passes of the common start over the reserved set."})
    num_models: int = field(default=3, metadata={"help": "M, the models of FedEM and FedMix, the heads of pFedMM."})
    rehearse: bool = field(
        default=False,
        metadata={"help": "Two short rounds first, that tell how long the run takes, how much memory and disk."},
    )
    compare: list[str] = field(
        default_factory=lambda: ["fedavg", "fedmoe"],
        metadata={"help": "What a recipe trains, in this order: names of methods."},
    )

    # What texts and images differ in
    mixture_class: ClassVar[type[FedMoEPreTrainedModel]]
    ensemble_class: ClassVar[type[EnsemblePreTrainedModel]]
    multi_head_class: ClassVar[type[MultiHeadPreTrainedModel]]
    source_arguments: ClassVar[tuple[str, ...]] = ("label_column",)
    partitions: ClassVar[tuple[str, ...]] = ("predominant", "dirichlet", "iid", "shards")
    lowest = {
        "num_main_experts": 0,
        "num_routed_experts": 1,
        "top_l": 1,
        "num_clients": 1,
        "examples_per_client": 1,
        "reserved_size": 0,
        "validation_size": 0,
        "max_train_examples": 1,
        "max_test_examples": 1,
        "start_epochs": 0,
        "num_models": 1,
    }
    shares: ClassVar[tuple[str, ...]] = ("client_test_share", "unseen_share")
    not_of_data = (
        *(*Experiment.not_of_data, "compare", "rehearse", "model_config", "gate", "start_epochs", "num_models"),
        *("num_main_experts", "num_routed_experts", "top_l", "peft", "rank", "target_modules", "augmentation"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(self.compare) or not self.compare:
            raise ValueError(f"`compare` is {self.compare}: give at least one name.")
        if len(set(self.compare)) < len(self.compare):
            raise ValueError(f"`compare` is {self.compare}: give every method once.")
        if self.partition not in self.partitions:
            raise ValueError(f"`partition` is {self.partition!r}: choose one of {', '.join(self.partitions)}.")
        if self.partition == "dirichlet" and self.dirichlet_alpha <= 0:
            raise ValueError(f"`dirichlet_alpha` is {self.dirichlet_alpha}: give more than 0, 0.1 is strong skew.")
        if self.partition == "predominant" and not 0 < self.share_low <= self.share_high <= 1:
            raise ValueError(
                f"`share_low` is {self.share_low} and `share_high` {self.share_high}: give shares above 0 and up to "
                "1, the low one first."
            )
        if self.reserved_share is not None and not 0 < self.reserved_share <= 1:
            raise ValueError(f"`reserved_share` is {self.reserved_share}: give a share in (0, 1], or leave it out.")

    @property
    def is_watched(self) -> bool:
        return self.validation_size > 0

    @abstractmethod
    def prepare(self, data: FederatedDataset, processor: Any) -> FederatedDataset:
        """Data as the model's collator takes it."""

    @abstractmethod
    def make_expert(self, data: FederatedDataset, processor: Any) -> PreTrainedModel:
        """A client model. Called after seeding."""

    def peft_config(self) -> PeftConfig | None:
        """The adapters that experts are, `None` for whole models."""
        return None

    def make_gate(self, num_experts: int) -> str | PreTrainedModel:
        """A gate which is a model: that named `gate`, or one like the experts."""
        name = find_model(self._gate_names())
        load_pretrained(AutoConfig, name)  # whose error names the model
        return name

    def _gate_names(self) -> list[str]:
        return self.model if self.gate in ("main_features", "adapter") else [self.gate]

    def collators(self, processor: Any) -> dict[str, Callable]:
        """Arguments of the trainer besides its defaults."""
        return {}

    @abstractmethod
    def show(self, folder: Path, data: FederatedDataset, processor: Any) -> None:
        """Uses the saved model as somebody would who has only the folder."""

    def load(self, name: str) -> datasets.DatasetDict:
        """Rows with labels for training and test; raises a `ValueError` when there is no such data set."""
        return load_source(name, **{argument: vars(self)[argument] for argument in self.source_arguments})

    def split(self, source: datasets.DatasetDict, seed: int) -> FederatedDataset:
        """Clients, reserved set, validation and test."""
        # The test rows are the same for every seed: seeds differ in clients, reserved set and initial weights.
        test = source["test"].shuffle(seed=0).select(range(min(self.max_test_examples, len(source["test"]))))
        train = source["train"]
        if self.max_train_examples is not None:
            train = train.shuffle(seed=seed).select(range(min(self.max_train_examples, len(train))))
        return FederatedDataset.split(
            train,
            lambda rows: self.divide(rows, seed),
            self.reserved_size,
            self.validation_size,
            test,
            seed,
            reserved_share=self.reserved_share,
        )

    def divide(self, rows: datasets.Dataset, seed: int) -> list[np.ndarray]:
        """The rows of each client."""
        labels, size = rows["label"], self.examples_per_client
        if self.partition == "predominant":
            return predominant(labels, self.num_clients, size, (self.share_low, self.share_high), seed)
        if self.partition == "dirichlet":
            return dirichlet(labels, self.num_clients, self.dirichlet_alpha, seed, min_size=10)
        if self.partition == "iid":
            return iid(len(rows), self.num_clients, seed, size)
        return shards(labels, self.num_clients, seed=seed)

    def hold_out(self, data: FederatedDataset, seed: int) -> FederatedDataset:
        """Clients with test rows of their own, where that is asked for."""
        if not self.client_test_share:
            return data
        return hold_out_client_tests(data, self.client_test_share, self.unseen_share, seed)


def build_classifier(
    auto_class: AutoClassifier, name: str, config: dict[str, Any], labels: dict[str, Any]
) -> PreTrainedModel:
    """
    A classifier from a folder or the Hub, or one of an architecture with random weights.

    Args:
        auto_class (`type`): `AutoModelForImageClassification` or `AutoModelForSequenceClassification`.
        name (`str`): A folder, a Hub id with a slash, or an architecture.
        config (`dict`): What the configuration of an architecture is to have.
        labels (`dict`): Arguments that say how many classes there are, and their names.

    Raises:
        `ValueError`: When there is no such model, or the architecture cannot be built like that.
    """
    if Path(name).is_dir() or "/" in name:
        return load_pretrained(auto_class, name, **labels, ignore_mismatched_sizes=True)
    if name not in CONFIG_MAPPING:
        near = get_close_matches(name, CONFIG_MAPPING.keys(), n=1)
        raise ValueError(
            f"There is no model {name!r}: it is no folder, none in $HF_FEDMOE_MODELS and no architecture"
            + (f", is it {near[0]}?" if near else ".")
        )
    try:
        defaults = CONFIG_MAPPING[name]()
        # A configuration takes them without a word.
        unknown = [setting for setting in config if not hasattr(defaults, setting)]
        if not unknown:
            return auto_class.from_config(AutoConfig.for_model(name, **config, **labels))
    except Exception as error:  # each architecture fails in its own way
        raise ValueError(
            f"`model_config` is {config}, with which a {name!r} cannot be built: {type(error).__name__}: {error}"
        ) from error
    near = get_close_matches(unknown[0], vars(defaults), n=1)
    raise ValueError(
        f"`model_config` has {unknown[0]!r}, which the configuration of a {name!r} has not"
        + (f": is it {near[0]}?" if near else ": leave it out.")
    )


def label_maps(data: FederatedDataset) -> dict[str, Any]:
    """The arguments of a classifier's configuration that name its classes."""
    return {
        "num_labels": data.num_labels,
        "id2label": dict(enumerate(data.label_names)),
        "label2id": {name: index for index, name in enumerate(data.label_names)},
    }
