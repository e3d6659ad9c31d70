"""Experiments on clients' own files and folders, as `hf-fedmoe train` runs them."""

import os
from abc import abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from peft import PeftConfig
from transformers import AutoImageProcessor, BaseImageProcessor, PreTrainedTokenizerBase

from ..data import FederatedDataset
from ..data.own_paths import OwnPath, named_paths
from ..training import FedMoETrainingArguments
from .classifier_experiment import ClassifierExperiment
from .experiment import find_model, load_pretrained
from .images import ImageExperiment
from .settings import parse_settings
from .texts import TextExperiment


SHIPPED_MODEL = "gpt2-reviews"
# A CNN of random weights for small images; with its own defaults it has seventeen times the weights.
SMALL_MODEL = "small_cnn"
SMALL_CONFIG = '{"channels": [32, 64], "kernel_size": 3, "padding": 1, "hidden_size": 128}'
# Settings of a start that knows little, and of one that was pretrained at length and would forget.
FROM_LITTLE = {"learning_rate": 6e-4, "expert_learning_rate": 3e-4, "gate_learning_rate": 5e-4}
FROM_LITTLE_WITH_LORA = {"learning_rate": 5e-3, "expert_learning_rate": 2e-3}
FROM_PRETRAINED = {"learning_rate": 1e-4, "expert_learning_rate": 5e-5, "gate_learning_rate": 5e-4}
FROM_PRETRAINED_WITH_LORA = {"learning_rate": 3e-3, "expert_learning_rate": 1e-3}
OF_IMAGES = {"learning_rate": 1e-3, "expert_learning_rate": 5e-4, "lr_scheduler_type": "constant"}
# All of a few clients take part in each round.
MOST_CLIENTS_PER_ROUND = 5
# The settings by which recipes simulate clients from one data set.
OF_SIMULATIONS = {
    *("partition", "dirichlet_alpha", "num_clients", "examples_per_client", "share_low", "share_high"),
    *("reserved_size", "reserved_share", "validation_size", "max_train_examples", "max_test_examples", "dataset"),
    *("preset_name", "compare", "unseen_share", "client_column", "coarse_column", "num_groups", "num_domains"),
    *("domain_shift", "test_share", "image_column"),
}


@dataclass
class OwnData(ClassifierExperiment):
    """Clients are what each path holds; the server's splits are paths too, or shares of the clients' rows."""

    clients: list[str] = field(default_factory=list, metadata={"help": "A path of each client, or NAME=PATH."})
    reserved: str = field(default="0.1", metadata={"help": "A path, or a share or number of rows of the clients'."})
    validation: str = field(default="0", metadata={"help": "The same, of the rows that rounds are watched on."})
    test: str = field(default="0.2", metadata={"help": "The same, of the test."})
    classes: list[str] | None = field(default=None, metadata={"help": "All classes in their order."})
    data_name: str = field(default="the clients' own", metadata={"help": "What the card calls the data."})

    @property
    def is_watched(self) -> bool:
        return _path_or_size(self.validation) != 0

    @property
    def model_name(self) -> str:
        """The start: a folder, a Hub id or an architecture."""
        return find_model(self.model)

    def load_data(self, processor: Any, seed: int) -> tuple[str, FederatedDataset]:
        return self.data_name, self.make_ready(self.read(seed), processor, seed)

    def make_ready(self, data: FederatedDataset, processor: Any, seed: int) -> FederatedDataset:
        """Data as trainers take them."""
        return self.hold_out(self.prepare(data, processor), seed)

    def remark(self, data: FederatedDataset) -> str:
        """A line on what became of the data on their way to the model, empty where that is nothing."""
        return ""

    def read(self, seed: int) -> FederatedDataset:
        """Clients and splits as they are on disk."""
        splits = {name: _path_or_size(vars(self)[name]) for name in ("reserved", "validation", "test")}
        if splits["test"] == 0:
            raise ValueError("`test` is 0, and nobody would know what the model is worth: give a file, or a share.")
        return self.read_paths(splits, seed)

    @abstractmethod
    def read_paths(self, splits: dict[str, OwnPath | int | float], seed: int) -> FederatedDataset:
        """Clients and splits from their paths."""


@dataclass
class OwnTexts(OwnData, TextExperiment):
    """Texts in files."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("text_column", "label_column"):
            if not vars(self)[name]:
                raise ValueError(f"`{name}` is missing: name the column of the files, --{name} NAME.")

    def read_paths(self, splits: dict[str, OwnPath | int | float], seed: int) -> FederatedDataset:
        assert self.text_column is not None and self.label_column is not None
        return FederatedDataset.from_files(
            self.clients, self.text_column, self.label_column, **splits, classes=self.classes, seed=seed
        )

    def remark(self, data: FederatedDataset) -> str:
        """Says how many texts are longer than the model reads, if many are."""
        lengths_N = pc.list_value_length(data.pool.data.column("input_ids")).to_numpy()
        cut = (lengths_N >= self.max_length).mean()
        return f"{cut:.0%} of the texts are cut after {self.max_length} tokens (--max_length)." if cut > 0.05 else ""

    def load_processor(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, which remembers where texts are cut."""
        tokenizer = super().load_processor()
        tokenizer.model_max_length = self.max_length
        return tokenizer

    def peft_config(self) -> PeftConfig | None:
        """Adapters whose base is saved with them if it is a folder of this machine, which is nobody else's."""
        config = super().peft_config()
        if config is not None and Path(self.model_name).is_dir():
            config.base_model_name_or_path = None
        return config


@dataclass
class OwnImages(OwnData, ImageExperiment):
    """Images in folders."""

    image_size: int = field(default=32, metadata={"help": "Height and width, of a start without weights."})
    num_channels: int = field(default=3, metadata={"help": "1 for grey, 3 for colour, of a start without weights."})

    def read_paths(self, splits: dict[str, OwnPath | int | float], seed: int) -> FederatedDataset:
        return FederatedDataset.from_folders(self.clients, **splits, classes=self.classes, seed=seed)

    def load_processor(self) -> BaseImageProcessor:
        """Loads that of a pretrained start, or makes one of small images."""
        if _is_pretrained(self.model_name):
            return load_pretrained(AutoImageProcessor, self.model_name)
        return super().load_processor()


def parse_own(told: dict[str, Any], images: bool) -> tuple[OwnData, FedMoETrainingArguments]:
    """
    Reads the settings of a run on own data.

    Args:
        told (`dict`): Any setting by name, as [`read_words`] returns them; defaults depend on the model.
        images (`bool`): Whether clients have folders of images, not files of texts.

    Raises:
        ValueError: When a setting is unknown, of simulations only, of another type or out of its range.
    """
    for name in told:
        if name in OF_SIMULATIONS:
            raise ValueError(f"`{name}` is a setting of simulated clients, and yours are who they are: leave it out.")
    if "label_names" in told:
        raise ValueError("`label_names` names columns of a batch: the classes in their order are `classes`.")
    if images and "peft" in told:
        raise ValueError("`--lora` is for models of texts: with `--images` clients train whole models, leave it out.")
    experiment_class: type[OwnData] = OwnImages if images else OwnTexts
    model = str(told.get("model") or (SMALL_MODEL if images else SHIPPED_MODEL))
    settings = {"model": model, "dataset": "own", "validation_size": 0, **_defaults(find_model([model]), images)}
    settings["clients_per_round"] = min(len(named_paths(told["clients"])), MOST_CLIENTS_PER_ROUND)
    if _path_or_size(str(told.get("validation", 0))) != 0:
        settings["eval_strategy"] = "steps"
    return parse_settings(experiment_class, settings, told)


def _defaults(model: str, images: bool) -> dict[str, Any]:
    common = {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 64, "eval_steps": 1}
    common["disable_tqdm"] = False  # whose default follows the log level
    if model == SMALL_MODEL:
        return common | OF_IMAGES | {"model_config": SMALL_CONFIG}
    if images:
        return common | (FROM_PRETRAINED if _is_pretrained(model) else OF_IMAGES)
    if Path(model).name == SHIPPED_MODEL:
        return common | FROM_LITTLE | {"with_lora": FROM_LITTLE_WITH_LORA}
    return common | FROM_PRETRAINED | {"with_lora": FROM_PRETRAINED_WITH_LORA}


def _is_pretrained(model: str) -> bool:
    """Tells a folder or a Hub id from the name of an architecture."""
    return Path(model).is_dir() or "/" in model


def _path_or_size(text: str) -> OwnPath | int | float:
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return os.fspath(text)
