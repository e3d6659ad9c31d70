"""What all recipes share: from a YAML of settings to a federation, a comparison, and a model on disk."""

import copy
import json
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Self

import datasets
import numpy as np
import torch
import yaml
from peft import PeftConfig
from transformers import HfArgumentParser, PreTrainedModel, set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from hf_fedmoe.data import FederatedDataset, dirichlet, iid, load_source, predominant, shards
from hf_fedmoe.models import FedMoEPreTrainedModel
from hf_fedmoe.reporting import ExpertAnalysis, analyse_experts, plot_gate, scores
from hf_fedmoe.strategies import FedAvg, FedAvgMovingAverage, FedAvgReserved, FedProx, Strategy
from hf_fedmoe.training import FederatedTrainer, FederatedTrainingArguments, FedMoETrainer


METHODS = (
    "fedavg",
    "fedprox",
    "fedavg_reserved",
    "fedavg_tuned_at_end",
    "fedavg_moving_average",
    "reserved_only",
    "cent_moe",
    "fedmoe",
)


# Of FedAvg fine-tuned at the end, where Fed-MoE does without.
TUNING_EPOCHS = 5


@dataclass
class RecipeArguments(ABC):
    """Data, models and what is compared. Lists of names are tried in order: the first that is there is used."""

    dataset: list[str] = field(metadata={"help": "A shipped one, a file, a name in $HF_FEDMOE_DATA, or a Hub id."})
    model: list[str] = field(metadata={"help": "A shipped one, a folder, a name in $HF_FEDMOE_MODELS, or a Hub id."})
    preset_name: str = field(default="quick", metadata={"help": "The block of the YAML that settings came from."})
    label_column: str | None = field(default=None, metadata={"help": "Column of labels, when it is not obvious."})
    gate: str = field(default="main_features", metadata={"help": "'main_features', 'adapter' or a model."})
    num_routed_experts: int = field(default=3, metadata={"help": "K."})
    top_l: int = field(default=1, metadata={"help": "L, routed experts per example at inference."})
    partition: str = field(default="predominant", metadata={"help": "Who holds what."})
    dirichlet_alpha: float = field(default=0.3, metadata={"help": "Concentration of the Dirichlet partition."})
    num_clients: int = field(default=10, metadata={"help": "M."})
    examples_per_client: int = field(default=300, metadata={"help": "Training examples of a client."})
    share_low: float = field(default=0.55, metadata={"help": "Least share of a client's predominant class."})
    share_high: float = field(default=0.65, metadata={"help": "Largest share of a client's predominant class."})
    reserved_size: int = field(default=500, metadata={"help": "Examples of the server's reserved set."})
    validation_size: int = field(default=500, metadata={"help": "Examples the server model is watched on."})
    max_test_examples: int = field(default=2000, metadata={"help": "Test examples that are used."})
    compare: list[str] = field(
        default_factory=lambda: ["fedavg", "fedmoe"],
        metadata={"help": f"What is trained, in this order: any of {', '.join(METHODS)}."},
    )

    # What text and images differ in
    mixture_class: ClassVar[type[FedMoEPreTrainedModel]]
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

    def make_gate(self) -> str | PreTrainedModel:
        """The gate named `gate`, when it is a model."""
        return find_model([self.gate])

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
        return FederatedDataset.split(
            source["train"],
            lambda rows: self.divide(rows, seed),
            self.reserved_size,
            self.validation_size,
            test,
            seed,
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
        return name, self.prepare(self.split(source, seed), processor)

    @classmethod
    def parse(cls, settings_file: Path, argv: list[str]) -> tuple[Self, FederatedTrainingArguments]:
        """
        The settings of one preset of the YAML (`--preset quick` unless told), each overridden by the command line.

        `--preset` names a block of the YAML; Fed-MoE's own `preset` argument is `--preset_of_method` here.
        """
        presets = yaml.safe_load(settings_file.read_text())
        name, rest = "quick", list(argv)
        if "--preset" in rest:
            place = rest.index("--preset")
            name = rest[place + 1] if place + 1 < len(rest) else ""
            del rest[place : place + 2]
        rest = ["--preset" if word == "--preset_of_method" else word for word in rest]
        if name not in presets:
            raise ValueError(f"`--preset` is {name!r}: {settings_file.name} has {', '.join(presets)}.")
        settings = {"preset_name": name, "output_dir": f"runs/{settings_file.stem}", **presets[name]}
        with_lora = settings.pop("with_lora", {})
        if "lora" in (settings.get("peft"), *(word for flag, word in pairwise(rest) if flag == "--peft")):
            settings |= with_lora  # adapters learn at other rates than whole models
        given = {argument[2:].split("=")[0].replace("-", "_") for argument in rest if argument.startswith("--")}
        defaults = []
        for key, value in settings.items():
            if key not in given:
                defaults += [f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)])]
        recipe, args = HfArgumentParser((cls, FederatedTrainingArguments)).parse_args_into_dataclasses(defaults + rest)
        return recipe, args


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


def make_trainer(
    method: str,
    recipe: RecipeArguments,
    args: FederatedTrainingArguments,
    data: FederatedDataset,
    processor: Any,
) -> FederatedTrainer:
    """A trainer of one method. Equal seeds give every method the same initial weights, clients and draws."""
    set_seed(args.seed)
    expert = recipe.make_expert(data, processor)
    shared = dict(args=args, train_dataset=data, processing_class=processor, **recipe.collators(processor))
    if method in ("fedmoe", "cent_moe"):
        gate = recipe.gate if recipe.gate in ("main_features", "adapter") else recipe.make_gate()
        mixture = recipe.mixture_class.from_expert(
            expert,
            gate=gate,
            num_routed_experts=recipe.num_routed_experts,
            top_l=recipe.top_l,
            peft_config=recipe.peft_config(),
        )
        if method == "fedmoe":
            return FedMoETrainer(mixture, **shared)
        # Cent-MoE: experts, gate and alpha together, by the loss of the mixture, on the reserved set alone.
        mixture.config.entropy_weight = args.entropy_weight
        return FederatedTrainer(mixture, **shared | centralised(args, data))
    shared["peft_config"] = recipe.peft_config()
    if method == "reserved_only":
        return FederatedTrainer(expert, **shared | centralised(args, data))
    strategies = averaging_strategies(args)
    if method not in strategies:
        raise ValueError(f"`compare` names {method!r}: choose from {', '.join(METHODS)}.")
    return FederatedTrainer(expert, strategy=strategies[method], **shared)


def averaging_strategies(args: FederatedTrainingArguments) -> dict[str, Strategy]:
    """The methods of one model, by their names."""
    # The controls train on the reserved set at the learning rate of Fed-MoE's experts and as long, if those do.
    server = dict(learning_rate=args.expert_learning_rate, batch_size=args.gate_batch_size)
    return {
        "fedavg": FedAvg(),
        "fedprox": FedProx(),
        "fedavg_reserved": FedAvgReserved("round", max(1, args.expert_epochs, args.download_epochs), **server),
        "fedavg_tuned_at_end": FedAvgReserved("end", args.final_expert_epochs or TUNING_EPOCHS, **server),
        "fedavg_moving_average": FedAvgMovingAverage(args.fusion_rate),
    }


def centralised(args: FederatedTrainingArguments, data: FederatedDataset) -> dict[str, Any]:
    """The reserved set as the only client, with as many rounds and local steps as an average client has."""
    args = copy.copy(args)
    args.clients_per_round = 1
    args.num_train_epochs *= data.client_sizes.mean() / len(data.reserved)
    alone = FederatedDataset(
        data.pool, [data.split_indices["reserved"]], validation=data.split_indices.get("validation"), test=data.test
    )
    return {"args": args, "train_dataset": alone}


def majority_scores(data: FederatedDataset) -> dict[str, float]:
    """Always the most frequent class of the reserved set."""
    counts = np.bincount(data.reserved["label"], minlength=data.num_labels)
    labels_N = torch.tensor(data.test["label"])
    most = torch.nn.functional.one_hot(torch.tensor(counts.argmax()), data.num_labels)
    return scores(most.float().expand(len(labels_N), -1), labels_N)


def analyse(trainer: FederatedTrainer, data: FederatedDataset, batch_size: int) -> ExpertAnalysis:
    """The experts of a trained mixture on the test set."""
    columns = ["input_ids", "attention_mask", "token_type_ids", "pixel_values", "label"]
    test = data.test.select_columns([column for column in columns if column in data.test.column_names])
    return analyse_experts(trainer.model, test, trainer.data_collator, batch_size)


def table(results: dict[str, dict[str, float]]) -> str:
    """Accuracy and macro-F1 in per cent."""
    lines = [f"{'':24s}{'accuracy':>10s}{'macro-F1':>10s}"]
    for name, score in results.items():
        lines.append(f"{name:24s}{100 * score['accuracy']:10.1f}{100 * score['macro_f1']:10.1f}")
    return "\n".join(lines)


def main(recipe_class: type[RecipeArguments], settings_file: Path) -> None:
    """Runs the recipe as `accelerate launch` calls it."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # of loading and saving weights; rounds keep theirs
    recipe, args = recipe_class.parse(settings_file, sys.argv[1:])
    output_dir, model_name = Path(args.output_dir), find_model(recipe.model)
    processor = recipe.load_processor()
    dataset_name, data = recipe.load_data(processor, args.seed)
    print(f"\n{settings_file.stem}, preset {recipe.preset_name}: {dataset_name}, experts {Path(model_name).name}")
    print(data.summary())
    output_dir.mkdir(parents=True, exist_ok=True)
    data.plot(output_dir / "clients.png")
    results = {"majority_class": majority_scores(data)}
    for method in recipe.compare:
        print(f"\n{method}: {args.rounds} rounds of {args.clients_per_round} of {data.num_clients} clients")
        args.output_dir = str(output_dir / method)
        trainer = make_trainer(method, recipe, args, data, processor)
        # Called again, the recipe goes on where it stopped; with other settings it asks for another folder.
        started = Path(args.output_dir).is_dir() and get_last_checkpoint(args.output_dir)
        trainer.train(resume_from_checkpoint=started or None)
        evaluated = trainer.evaluate(data.test, metric_key_prefix="test")
        results[method] = {name: evaluated[f"test_{name}"] for name in ("accuracy", "macro_f1", "auc")}
    found = {}
    if recipe.compare[-1] == "fedmoe":
        analysis = analyse(trainer, data, args.eval_batch_size)
        plot_gate(analysis.share_KC, data.label_names, output_dir / "gate.png")
        results |= {f"  {name}": analysis.scores[name] for name in ("dense", "best_expert", "uniform_ensemble")}
        results["  oracle_expert"] = analysis.scores["oracle_expert"]
        found["gate_share_KC"] = analysis.share_KC
    (output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"\nOn {len(data.test)} test examples:\n{table(results)}")

    trainer.save_model(str(output_dir / "model"))
    trainer.create_model_card(
        model_name=f"{settings_file.stem}-{recipe.compare[-1]}",
        dataset=dataset_name,
        folder=output_dir / "model",
        comparison={name.replace("  ", "fedmoe: "): score for name, score in results.items()},
        **found,
    )
    print(f"\nLoaded back from {output_dir / 'model'}:")
    recipe.show(output_dir / "model", data, processor)
