"""A federation in a YAML file: what the server makes of it, what it sends to nodes, and what they make of that."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, set_seed

from ..data import FederatedDataset
from ..data.label_maps import merge_names, with_label_map
from ..experiments import ImageExperiment, TextExperiment, parse_settings
from ..experiments.classifier_experiment import ClassifierExperiment
from ..experiments.methods import WITHOUT_STRATEGY, check_method, make_strategy
from ..experiments.named_strategies import STRATEGIES
from ..experiments.server_models import MIXTURES, MODELS
from ..experiments.settings import Setting, typed_settings
from ..experiments.yaml_files import read_yaml
from ..strategies import FedMoE, FedMoESettings, Strategy
from ..training import FedMoETrainingArguments
from .client_rows import named_rows
from .link import Link
from .node_trainer import NodeTrainer
from .roster import MAX_EXAMPLES
from .server_dataset import ServerDataset
from .server_trainer import ServerTrainer


# What clients classify, as the `kind` of a federation's file names it.
KINDS: dict[str, type[ClassifierExperiment]] = {"texts": TextExperiment, "images": ImageExperiment}
# What a federation's file has besides the settings of recipes; files are found beside it.
OWN_SETTINGS = {
    "kind": Setting(str, tuple(KINDS)),
    "method": Setting(str),
    "labels": Setting(list[str]),
    "reserved": Setting(str),
    "validation": Setting(str),
    "test": Setting(str),
    "min_clients": Setting(int),
    "round_timeout": Setting(float),
    "max_client_examples": Setting(int),
}
# Settings of recipes that say nothing here: who holds what is as it is, and code does not travel.
NOT_HERE = (
    *("dataset", "preset_name", "partition", "dirichlet_alpha", "examples_per_client", "share_low", "share_high"),
    *("reserved_size", "reserved_share", "validation_size", "max_train_examples", "max_test_examples"),
    *("unseen_share", "start_epochs", "plugin", "compare", "with_lora"),
    *("client_column", "coarse_column", "num_groups", "num_domains", "domain_shift", "test_share"),
)
# What a server that only needs sums could do without seeing uploads, and cannot yet.
SECURE_AGGREGATION = "secure_aggregation"
# Settings of the machine that they stand on: a node has its own.
OF_THE_SERVER = ("output_dir", "report_to", "push_to_hub", "hub_model_id", "hub_token", "eval_strategy", "eval_steps")


@dataclass
class Parts:
    """
    Model, method and arguments, which both ends make of settings alike.

    Args:
        model ([`~transformers.PreTrainedModel`]), strategy ([`~strategies.Strategy`]): Of the federation.
        args ([`FedMoETrainingArguments`]): Of the run.
        others (`dict`): Further arguments of a trainer.
    """

    model: PreTrainedModel
    strategy: Strategy
    args: FedMoETrainingArguments
    others: dict[str, Any]


def read_federation(file: str | Path, told: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    Reads a federation's YAML.

    Args:
        file (`str`): The file.
        told (`dict`, *optional*): Settings that go before those of the file.

    Returns:
        `tuple[dict, dict]`: Its own settings, and those of the method, model and training.

    Raises:
        ValueError: For a setting that does not exist or means nothing here.
    """
    given = read_yaml(Path(file)) | (told or {})
    own = typed_settings({name: given.pop(name) for name in OWN_SETTINGS if name in given}, OWN_SETTINGS)
    check_settings(given)
    if "num_clients" not in given:
        raise ValueError("`num_clients` is missing: say how many clients the federation has, num_clients: 3.")
    for name in ("reserved", "validation", "test"):
        if name in own:
            own[name] = str(Path(file).parent / own[name])
    # From where the command is given it would be another folder than from where Flower runs its app.
    given["output_dir"] = str(Path(file).resolve().parent / given.get("output_dir", f"runs/{Path(file).stem}"))
    limits = {"min_clients": 1, "round_timeout": 600.0, "max_client_examples": MAX_EXAMPLES}
    return {"kind": "texts", "method": "fedmoe", **limits, **own}, given


def check_settings(given: dict[str, Any]) -> None:
    """Raises `ValueError` for settings that mean nothing here, or that no node should take from a server."""
    if SECURE_AGGREGATION in given:
        raise ValueError(
            f"`{SECURE_AGGREGATION}` is {given[SECURE_AGGREGATION]!r}, but there is none: Flower 1.42 has SecAgg+ in "
            "the API that its Message API replaces only, and nothing of that kind is written here. The server sees "
            "every upload by itself (docs/privacy.md): leave it out."
        )
    for name in NOT_HERE:
        if name in given:
            raise ValueError(
                f"`{name}` is {given[name]!r}, which says nothing where clients are elsewhere: leave it out."
            )


def make_server_trainer(file: str | Path, link: Link, told: dict[str, Any] | None = None) -> ServerTrainer:
    """Makes the server's trainer of a federation's YAML; raises `ValueError` for what is wrong with that."""
    own, settings = read_federation(file, told)
    experiment, _ = parse(own["kind"], settings)
    columns = {name: vars(experiment)[name] for name in experiment.source_arguments}
    rows = {name: named_rows(own[name], columns) for name in ("reserved", "validation", "test") if name in own}
    names = own.get("labels") or merge_names([tuple(set(each["label"])) for each in rows.values()], [])
    rows = {name: with_label_map(each, "label", names, name) for name, each in rows.items()}
    data = ServerDataset(experiment.num_clients, rows.get("reserved"), rows.get("validation"), rows.get("test"))
    parts, prepared = make_parts(own["kind"], own["method"], settings, data)
    assert isinstance(prepared, ServerDataset)  # it is a copy of one
    sent = {name: value for name, value in settings.items() if name not in OF_THE_SERVER}
    return ServerTrainer(
        parts.model,
        parts.args,
        prepared,
        link,
        settings={"kind": own["kind"], "method": own["method"], "settings": sent, "label_names": names},
        min_clients=own["min_clients"],
        round_timeout=own["round_timeout"],
        max_client_examples=own["max_client_examples"],
        client_test_share=experiment.client_test_share,
        strategy=parts.strategy,
        **parts.others,
    )


def make_node_trainer(
    sent: dict[str, Any], folder: str | Path, load: Callable[[dict[str, Any]], Dataset]
) -> NodeTrainer:
    """
    Makes a node's trainer of the settings that a server sent.

    Args:
        sent (`dict`): The settings.
        folder (`str`): The node's.
        load (`Callable`): From the names of the columns of contents and labels, as the server calls them, to the
            client's rows, which have them as `text` or `image`, and `label`.
    """
    check_settings(sent["settings"])
    settings = {**sent["settings"], "output_dir": str(Path(folder) / "trainer")}
    kind = str(sent["kind"])
    experiment, _ = parse(kind, settings)
    rows = load({name: vars(experiment)[name] for name in experiment.source_arguments})
    rows = with_label_map(rows, "label", list(sent["label_names"]), "the client's rows")
    parts, data = make_parts(kind, str(sent["method"]), settings, FederatedDataset.from_clients({"here": rows}))
    share = experiment.client_test_share
    return NodeTrainer(parts.model, parts.args, data.pool, parts.strategy, client_test_share=share, **parts.others)


def parse(kind: str, settings: dict[str, Any]) -> tuple[ClassifierExperiment, FedMoETrainingArguments]:
    """Reads settings as recipes of a kind do."""
    told = {"use_cpu": True} if settings.get("use_cpu") else {}
    return parse_settings(KINDS[kind], {**settings, "dataset": ["elsewhere"]}, told)


def make_parts(
    kind: str, method: str, settings: dict[str, Any], data: FederatedDataset
) -> tuple[Parts, FederatedDataset]:
    """Makes model, strategy and arguments of settings, and prepares the rows for the model."""
    experiment, args = parse(kind, settings)
    check_method(method, experiment, args)
    processor = experiment.load_processor()
    data = experiment.prepare(data, processor)
    set_seed(args.seed)
    expert = experiment.make_expert(data, processor)
    if method == "fedmoe":
        own = {field.name: vars(args)[field.name] for field in dataclasses.fields(FedMoESettings)}
        strategy: Strategy = FedMoE(FedMoESettings(**own))
    elif method in STRATEGIES:
        strategy = make_strategy(method, experiment, args, expert)
    else:
        raise ValueError(f"`method` is {method!r}, which has no clients: choose another.")
    kind = WITHOUT_STRATEGY.get(method, strategy.trains)
    model = MODELS[kind](expert, experiment, args.seed, _refuse_to_train)
    others = {"processing_class": processor, **experiment.collators(processor)}
    if kind not in MIXTURES:
        others["peft_config"] = experiment.peft_config()
    return Parts(model, strategy, args, others), data


def _refuse_to_train(model: PreTrainedModel) -> None:
    raise ValueError(
        "This method begins with a model that the server has trained, which nodes do not have: save it, and name its "
        "folder as `model`."
    )
