"""An experiment: from settings to clients, reserved set and models."""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import yaml
from peft import PeftConfig
from transformers import HfArgumentParser, PreTrainedModel

from ..data import FederatedDataset, dirichlet, hold_out_client_tests, iid, load_source, predominant, shards
from ..models import EnsemblePreTrainedModel, FedMoEPreTrainedModel, MultiHeadPreTrainedModel
from ..training import FederatedTrainingArguments


@dataclass
class Experiment(ABC):
    """Data, models and what is compared. Lists of names are tried in order: the first that is there is used."""

    dataset: list[str] = field(metadata={"help": "A shipped one, a file, a name in $HF_FEDMOE_DATA, or a Hub id."})
    model: list[str] = field(metadata={"help": "A shipped one, a folder, a name in $HF_FEDMOE_MODELS, or a Hub id."})
    preset_name: str = field(default="quick", metadata={"help": "The block of the YAML that settings came from."})
    label_column: str | None = field(default=None, metadata={"help": "Column of labels, when it is not obvious."})
    gate: str = field(default="main_features", metadata={"help": "'main_features', 'adapter' or a model."})
    num_main_experts: int = field(default=1, metadata={"help": "Main experts of the mixture, 0 to 3."})
    num_routed_experts: int = field(default=3, metadata={"help": "K."})
    top_l: int = field(default=1, metadata={"help": "L, routed experts per example at inference."})
    partition: str = field(default="predominant", metadata={"help": "Who holds what."})
    dirichlet_alpha: float = field(default=0.3, metadata={"help": "Concentration of the Dirichlet partition."})
    num_clients: int = field(default=10, metadata={"help": "M."})
    examples_per_client: int = field(default=300, metadata={"help": "Training examples of a client."})
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
    method_settings: str = field(
        default="{}", metadata={"help": 'JSON: settings of a method by its name, {"fedprox": {"mu": 0.1}}.'}
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

    @abstractmethod
    def load_processor(self) -> Any:
        """The tokenizer or image processor."""

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
        return find_model(self._gate_names())

    def _gate_names(self) -> list[str]:
        return self.model if self.gate in ("main_features", "adapter") else [self.gate]

    def collators(self, processor: Any) -> dict[str, Callable]:
        """Arguments of the trainer besides its defaults."""
        return {}

    @abstractmethod
    def show(self, folder: Path, data: FederatedDataset, processor: Any) -> None:
        """Uses the saved model as somebody would who has only the folder."""

    def source(self) -> tuple[str, datasets.DatasetDict]:
        """The first data set of the list that is at hand, and its name."""
        problems = []
        for name in self.dataset:
            try:
                return name, self.load(name)
            except (FileNotFoundError, ValueError) as error:
                problems.append(str(error))
        raise ValueError("None of the data sets could be loaded. " + " ".join(problems))

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
        if self.partition == "shards":
            return shards(labels, self.num_clients, seed=seed)
        raise ValueError(f"`partition` is {self.partition!r}: choose one of {', '.join(self.partitions)}.")

    def load_data(self, processor: Any, seed: int) -> tuple[str, FederatedDataset]:
        """The name of the data set that was found, and its clients and server splits, ready for the trainer."""
        name, source = self.source()
        data = self.prepare(self.split(source, seed), processor)
        if self.client_test_share:
            data = hold_out_client_tests(data, self.client_test_share, self.unseen_share, seed)
        return name, data


def read_preset(settings_file: Path, name: str) -> dict[str, Any]:
    """The settings of one preset of a recipe's YAML."""
    presets = yaml.safe_load(settings_file.read_text())
    if name not in presets:
        raise ValueError(f"`--preset` is {name!r}: {settings_file.name} has {', '.join(presets)}.")
    return {"preset_name": name, "output_dir": f"runs/{settings_file.stem}", **presets[name]}


def parse_settings(
    experiment_class: type[Experiment], settings: dict[str, Any], argv: list[str]
) -> tuple[Experiment, FederatedTrainingArguments]:
    """
    An experiment and the arguments of its runs from settings, each overridden by the command line.

    Settings under `with_lora` take the place of others where experts are adapters: those learn at other rates than
    whole models. Fed-MoE's own `preset` argument is `--preset_of_method` on the command line.

    Raises:
        `ValueError`: When a setting is unknown or out of its range.
    """
    argv = ["--preset" if word == "--preset_of_method" else word for word in argv]
    settings = dict(settings)
    with_lora = settings.pop("with_lora", {})
    if "lora" in (settings.get("peft"), *(word for flag, word in pairwise(argv) if flag == "--peft")):
        settings |= with_lora
    known = [field for part in (experiment_class, FederatedTrainingArguments) for field in fields(part) if field.init]
    for name in settings:
        if name not in (names := [field.name for field in known]):
            near = get_close_matches(name, names)
            raise ValueError(f"There is no setting {name!r}" + (f": is it {' or '.join(near)}?" if near else "."))
    given = {argument[2:].split("=")[0].replace("-", "_") for argument in argv if argument.startswith("--")}
    defaults = []
    for key, value in settings.items():
        if value is False and key.endswith("_strategy"):
            value = "no"  # which YAML takes for False
        if key not in given:
            words = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
            defaults += [f"--{key}", *map(str, words)]
    for name in ("dataset", "model"):
        if name not in given and name not in settings:
            raise ValueError(f"There is no {name!r} among the settings: name one, or a recipe that does.")
    parser = HfArgumentParser((experiment_class, FederatedTrainingArguments), allow_abbrev=False)
    return parser.parse_args_into_dataclasses(defaults + argv)


def find_model(names: list[str]) -> str:
    """The first model of the list at hand: shipped, in $HF_FEDMOE_MODELS, or a folder; else the last as a Hub id."""
    for name in names:
        shipped = files("hf_fedmoe") / "assets" / name
        local = Path(os.environ.get("HF_FEDMOE_MODELS", ""), name)
        for folder in (shipped, local if "HF_FEDMOE_MODELS" in os.environ else None, Path(name)):
            if folder is not None and folder.is_dir():
                return str(folder)
    return names[-1]


def label_maps(data: FederatedDataset) -> dict[str, Any]:
    """The arguments of a classifier's configuration that name its classes."""
    return {
        "num_labels": data.num_labels,
        "id2label": dict(enumerate(data.label_names)),
        "label2id": {name: index for index, name in enumerate(data.label_names)},
    }
