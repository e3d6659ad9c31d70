"""The model card: what was trained, on whose data, how to load it and what to beware of.

Shape suffixes: S experts (main ones first), K routed experts, M clients, C classes.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from transformers import PreTrainedModel

from .. import __version__
from ..models import AdapterExpert, FedMoEPreTrainedModel
from ..models.configuration_checks import built, class_names
from .expert_facts import ExpertFacts, write_expert_facts
from .markdown import Markup, code, plain, table
from .privacy_facts import ExamplePrivacyFacts, PrivacyFacts


TEMPLATE = Path(__file__).with_name("model_card_template.md")
TAGS = ("federated-learning",)
MIXTURE_TAGS = ("fedmoe", "mixture-of-experts")
# Name in the card, metric type of the Hub.
METRICS = {
    "accuracy": ("Accuracy", "accuracy"),
    "macro_f1": ("Macro-F1", "f1"),
    "auc": ("AUC", "roc_auc"),
    "loss": ("Loss", "loss"),
}
SPLITS = {"eval": "validation", "test": "test"}
MAX_LISTED_CLIENTS = 30


@dataclass(frozen=True)
class Usage:
    """The lines of Python by which the card shows a model in use; the model's id goes behind `load`."""

    task: str
    imports: str
    load: str
    model: str
    use: str
    imports_of_use: str = ""


def _pipeline(task: str, example: str) -> Usage:
    load, use = f'classify = pipeline("{task}", model=', f'print(classify("{example}"))'
    return Usage(task, "from transformers import pipeline", load, "classify.model", use)


# By what a classifier reads. Characters have no tokenizer and vectors no pipeline.
USAGES = {
    "image": _pipeline("image-classification", "image.png"),
    "text": _pipeline("text-classification", "A sentence to classify."),
    "character": Usage(
        "text-classification",
        "from transformers import AutoModelForSequenceClassification",
        "model = AutoModelForSequenceClassification.from_pretrained(",
        "model",
        'input_ids = torch.tensor([[string.printable.index(character) for character in "To be, or not to b"]])\n'
        "print(model.config.id2label[model(input_ids).logits.argmax().item()])",
        "import string\n\nimport torch\n",
    ),
    "vector": Usage(
        "tabular-classification",
        "from transformers import AutoModel",
        "model = AutoModel.from_pretrained(",
        "model",
        "print(model(torch.zeros(1, model.config.num_features)).logits.softmax(-1))",
        "import torch\n",
    ),
}


@dataclass
class RunFacts:
    """
    A trainer's knowledge of its run.

    Args:
        method (`str`): Name of the strategy.
        settings (`dict[str, Any]`): Of the strategy.
        local (`dict[str, Any]`): What a client does in a round, by the names of the training arguments.
        clients_per_round (`int`): m.
        client_sizes_M (`np.ndarray` of shape `[M]`): Examples of each client.
        client_names (`list[str]`, *optional*): What each client is called; their numbers if left out.
        reserved_size (`int`): Examples of the reserved set that the method reads, 0 if it reads none.
        rounds (`int`): Rounds that were run.
        chosen_round (`int`, *optional*): The round whose model was kept, when the best one was loaded at the end.
        bytes_up (`int`), bytes_down (`int`): Communication in the counted rounds.
        counted_rounds (`int`): Rounds whose communication is known.
        participations_M (`np.ndarray` of shape `[M]`, *optional*): Rounds in which each client took part.
        refused (`int`): Uploads that were refused in the counted rounds.
        contribution_SM (`np.ndarray` of shape `[S, M]`, *optional*): How much of each expert came from each client.
        evaluations (`dict[str, dict[str, float]]`): Metrics of the finished model by prefix, e.g. `"test"`.
        privacy ([`PrivacyFacts`], *optional*): Of a run with differential privacy of clients.
        example_privacy ([`ExamplePrivacyFacts`], *optional*): Of a run with differential privacy of examples.
    """

    method: str
    settings: dict[str, Any]
    local: dict[str, Any]
    clients_per_round: int
    client_sizes_M: np.ndarray
    reserved_size: int = 0
    rounds: int = 0
    chosen_round: int | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    counted_rounds: int = 0
    participations_M: np.ndarray | None = None
    refused: int = 0
    contribution_SM: np.ndarray | None = None
    evaluations: dict[str, dict[str, float]] = field(default_factory=dict)
    client_names: list[str] | None = None
    privacy: PrivacyFacts | None = None
    example_privacy: ExamplePrivacyFacts | None = None

    @property
    def names(self) -> list[str]:
        """Names of the clients, their numbers where none were given."""
        if self.client_names is None:
            return [str(client) for client in range(len(self.client_sizes_M))]
        return self.client_names


def write_model_card(
    folder: str | os.PathLike,
    model: PreTrainedModel,
    run: RunFacts | None = None,
    *,
    model_name: str | None = None,
    model_id: str | None = None,
    language: str | None = None,
    license: str | None = None,
    tags: str | Iterable[str] = (),
    base_model: str | None = None,
    dataset: str | None = None,
    dataset_id: str | None = None,
    comparison: dict[str, dict[str, float]] | None = None,
    gate_share_KC: np.ndarray | None = None,
) -> ModelCard:
    """
    Writes `README.md` with the metadata of the Hugging Face Hub beside a saved model.

    Args:
        folder (`str` or `os.PathLike`): Where the model is saved.
        model ([`~transformers.PreTrainedModel`]): A mixture, or the single model of another method.
        run ([`RunFacts`], *optional*): What is known of its training.
        model_name (`str`, *optional*): Title; the folder's name if left out.
        model_id (`str`, *optional*): What to load it by, `"user/name"`; `"<user>/<model_name>"` if left out.
        language (`str`, *optional*): Of the texts.
        license (`str`, *optional*): Of the weights, by its Hub name.
        tags (`str` or `Iterable[str]`, *optional*): Besides those that every card has.
        base_model (`str`, *optional*): Hub id of the model that the experts started from. By default the one that the
            experts' configuration names, unless that is a folder.
        dataset (`str`, *optional*): What the data is called. With it, evaluations become the `model-index`.
        dataset_id (`str`, *optional*): Its Hub id.
        comparison (`dict[str, dict[str, float]]`, *optional*): Metrics of other methods on the same test set.
        gate_share_KC (`np.ndarray` of shape `[K, C]`, *optional*): Mean gate probability by expert and true class;
            classes of NaN, without examples, are left out.

    Returns:
        `huggingface_hub.ModelCard`

    Raises:
        ValueError: When an array does not fit the model or the clients.
    """
    folder = Path(folder)
    config, mixture = model.config, model if isinstance(model, FedMoEPreTrainedModel) else None
    model_name = model_name or folder.absolute().name
    contribution_SM = None if run is None else run.contribution_SM
    if (gate_share_KC is not None or contribution_SM is not None) and mixture is None:
        raise ValueError(
            f"`model` is a {type(model).__name__}, which has neither gate nor experts: leave `gate_share_KC` and "
            "`contribution_SM` out."
        )
    expert_names = names_of_experts(mixture) if mixture else []
    by_label = class_names(config)
    label_names = [by_label[index] for index in range(len(by_label))]
    _check_shape("gate_share_KC", gate_share_KC, (getattr(config, "num_routed_experts", 0), len(label_names)))
    _check_shape(
        "contribution_SM", contribution_SM, (len(expert_names), 0 if run is None else len(run.client_sizes_M))
    )
    evaluations = {} if run is None else run.evaluations
    kind = _kind(
        model.main_input_name, built(mixture.config.expert_config).model_type if mixture else config.model_type
    )
    usage = _adapter_usage(model, kind) if isinstance(model, PeftModel) else USAGES[kind]
    task = usage.task
    shown, loaded = dataset or dataset_id, dataset_id or dataset
    results = _eval_results(task, evaluations, shown, loaded) if shown and loaded else []
    data = ModelCardData(
        model_name=model_name,
        library_name="peft" if isinstance(model, PeftModel) else "transformers",
        pipeline_tag=task,
        tags=[*(MIXTURE_TAGS if mixture else ()), *TAGS, task, *([tags] if isinstance(tags, str) else tags)],
        language=language,
        license=license,
        base_model=base_model or _hub_id(mixture.config.expert_config if mixture else config),
        datasets=[dataset_id] if dataset_id else None,
        metrics=sorted({result.metric_type for result in results}) or None,
        eval_results=results or None,
    )
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        title=plain(model_name),
        made_with=f"hf_fedmoe {__version__}, PyTorch {torch.__version__} and transformers {transformers.__version__}",
        model_id=_quoted(model_id or f"<user>/{model_name}"),
        run=run,
        is_mixture=mixture is not None,
        own_code=mixture is not None or config.is_remote_code(),
        kind=kind,
        usage=usage,
        needs_peft=mixture is not None and mixture.config.peft_config is not None,
        method=code(run.method if run else "see hf_fedmoe/strategies"),
        dataset_text=plain(dataset or dataset_id or ""),
        labels=[plain(name) for name in label_names],
        mixture=table(_mixture_rows(mixture), ["", ""]) if mixture else "",
        training=training_table(run) if run else "",
        settings=table(list(run.settings.items()), ["setting", "value"]) if run and run.settings else "",
        results=_metrics_table({SPLITS.get(name, name): found for name, found in evaluations.items()}),
        comparison=_metrics_table(comparison or {}),
        gate=_gate_table(gate_share_KC, expert_names, label_names) if gate_share_KC is not None else "",
        participations=_participations(run, run.participations_M) if run and run.participations_M is not None else "",
        contributions=""
        if run is None or contribution_SM is None
        else _contributions(run, contribution_SM, expert_names),
    )
    card.save(folder / "README.md")
    write_expert_facts(folder, _expert_facts(run, contribution_SM, gate_share_KC, label_names))
    return card


def training_table(run: RunFacts) -> str:
    """Returns how a model was trained, as a table of Markdown."""
    return table(_training_rows(run), ["", ""])


def _kind(main_input_name: str, model_type: str) -> str:
    """Names what the model reads, as in `USAGES`."""
    if main_input_name == "input_ids":
        return "character" if model_type == "char_lstm" else "text"
    return "image" if main_input_name == "pixel_values" else "vector"


def _adapter_usage(model: PeftModel, kind: str) -> Usage:
    """An adapter does not know the labels of its head: the base has to be told."""
    auto_class = "AutoModelForImageClassification" if kind == "image" else "AutoModelForSequenceClassification"
    base = _quoted(_hub_id(model.config) or "<base>")
    return Usage(
        USAGES[kind].task,
        f"from peft import PeftModel\nfrom transformers import {auto_class}",
        f"base = {auto_class}.from_pretrained(\n"
        f"    {base}, id2label={_without_fence(repr(model.config.id2label))}, ignore_mismatched_sizes=True\n)\n"
        "model = PeftModel.from_pretrained(base, ",
        "model",
        "print(model)",
    )


def _quoted(text: str) -> str:
    """Writes a string of Python."""
    return _without_fence(json.dumps(text, ensure_ascii=False))


def _without_fence(literal: str) -> str:
    """Writes backticks, which could end the block of code, otherwise."""
    return literal.replace("`", "\\x60")


def _hub_id(config: Any) -> str | None:
    """The Hub id that a configuration was loaded from; a folder of this machine is nobody's business."""
    name = config._name_or_path
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if not name or Path(name).exists() else name


def _eval_results(
    task: str, evaluations: dict[str, dict[str, float]], dataset_name: str, dataset_type: str
) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=task,
            dataset_type=dataset_type,
            dataset_name=dataset_name,
            dataset_split=SPLITS.get(prefix, prefix),
            metric_type=METRICS[name][1],
            metric_name=METRICS[name][0],
            metric_value=round(value, 4),
        )
        for prefix, found in evaluations.items()
        for name, value in found.items()
        if name in METRICS and not math.isnan(value)
    ]


def names_of_experts(model: FedMoEPreTrainedModel) -> list[str]:
    """Returns what the card and the demo call the experts, main ones first."""
    mains = model.config.num_main_experts
    main = ["main expert"] if mains == 1 else [f"main expert {index}" for index in range(mains)]
    return main + [f"routed expert {k}" for k in range(model.config.num_routed_experts)]


def _mixture_rows(model: FedMoEPreTrainedModel) -> list[tuple[str, Any]]:
    config, expert = model.config, model.experts[0]
    architecture, base = type(expert).__name__, []
    if isinstance(expert, AdapterExpert):
        peft_config = config.peft_config or {}
        architecture = f"{peft_config.get('peft_type')} adapter of one {type(expert.base).__name__}, with a head"
        named = peft_config.get("base_model_name_or_path")
        base = [("Base of the adapters", "loaded by its name" if named else "saved with them")]
    gate = "linear, on the main expert's pooled features"
    if config.gate == "adapter":
        gate = "an adapter of the same base and a linear layer on its pooled features"
    if config.gate == "model":
        gate = f"{type(model.gate).__name__}, {_count(model.gate)} parameters"
    return [
        ("Main experts", config.num_main_experts),
        ("Routed experts (K)", config.num_routed_experts),
        ("Each expert", f"{architecture}, {_count(expert)} parameters"),
        *base,
        ("Gate", gate),
        ("Weight of the routed part (alpha)", f"{model.alpha.item():.3f}" if config.num_main_experts else "all"),
        ("Routed experts run per example (top-L)", config.top_l),
        ("What is mixed", config.mix),
        ("All parameters", _count(model)),
    ]


def _training_rows(run: RunFacts) -> list[tuple[str, Any]]:
    sizes_M = run.client_sizes_M
    examples = f"{sizes_M.min()}" if sizes_M.min() == sizes_M.max() else f"{sizes_M.min()} to {sizes_M.max()}"
    kept = f", the model of round {run.chosen_round} kept" if run.chosen_round else ""
    counted = "" if run.counted_rounds == run.rounds else f" in {run.counted_rounds} of {run.rounds} rounds"
    rows = [
        ("Method", code(run.method)),
        ("Rounds", f"{run.rounds}{kept}"),
        ("Clients", f"{len(sizes_M)}, {run.clients_per_round} in each round"),
        ("Examples of a client", "not told" if run.privacy else examples),
        ("Reserved set of the server", f"{run.reserved_size} labelled examples" if run.reserved_size else "none used"),
        *((Markup(f"{code(name)} of a client"), value) for name, value in run.local.items()),
    ]
    if run.rounds and not run.counted_rounds:  # a private run tells nothing of single rounds
        return rows
    return [
        *rows,
        ("Clients to server", f"{run.bytes_up / 1e6:,.1f} MB{counted}"),
        ("Server to clients", f"{run.bytes_down / 1e6:,.1f} MB{counted}"),
        ("Uploads refused", f"{run.refused}{counted}"),
    ]


def _participations(run: RunFacts, rounds_M: np.ndarray) -> str:
    if len(rounds_M) > MAX_LISTED_CLIENTS:
        return (
            f"{(rounds_M > 0).sum()} of {len(rounds_M)} clients took part, {rounds_M.min()} to {rounds_M.max()} times."
        )
    return table(
        list(zip(run.names, run.client_sizes_M, rounds_M, strict=True)),
        ["client", "examples", "rounds"],
    )


def _givers(contribution_SM: np.ndarray) -> np.ndarray:
    """The clients that gave most."""
    return np.sort(np.argsort(-contribution_SM.sum(0), kind="stable")[:MAX_LISTED_CLIENTS])


def _contributions(run: RunFacts, contribution_SM: np.ndarray, expert_names: list[str]) -> str:
    clients = _givers(contribution_SM)
    names = [f"client {run.names[client]}" for client in clients]
    return _array_table(contribution_SM[:, clients].T, names, expert_names)


def _metrics_table(found: dict[str, dict[str, float]]) -> str:
    names = [name for name in METRICS if any(name in metrics for metrics in found.values())]
    rows = [(row, *(f"{found[row][name]:.4f}" if name in found[row] else "" for name in names)) for row in found]
    return table(rows, ["", *(METRICS[name][0] for name in names)]) if names else ""


def _expert_facts(
    run: RunFacts | None,
    contribution_SM: np.ndarray | None,
    gate_share_KC: np.ndarray | None,
    label_names: list[str],
) -> ExpertFacts:
    """Collects what the card says of the experts."""
    clients, contribution, classes, share = [], [], [], []
    if run is not None and contribution_SM is not None:
        givers = _givers(contribution_SM)
        clients, contribution = [run.names[client] for client in givers], contribution_SM[:, givers].tolist()
    if gate_share_KC is not None:
        found = _with_examples(gate_share_KC)
        classes, share = [label_names[label] for label in found], gate_share_KC[:, found].tolist()
    return ExpertFacts(clients, contribution, classes, share)


def _with_examples(share_KC: np.ndarray) -> np.ndarray:
    return np.flatnonzero(~np.isnan(share_KC).any(axis=0))


def _gate_table(share_KC: np.ndarray, expert_names: list[str], label_names: list[str]) -> str:
    found = _with_examples(share_KC)
    return _array_table(share_KC[:, found], expert_names[-len(share_KC) :], [label_names[label] for label in found])


def _array_table(values: np.ndarray, rows: list[str], columns: list[str]) -> str:
    cells = [(name, *(f"{value:.2f}" for value in line)) for name, line in zip(rows, values, strict=True)]
    return table(cells, ["", *columns])


def _check_shape(name: str, array: np.ndarray | None, shape: tuple[int, int]) -> None:
    if array is not None and not (
        array.ndim == 2 and array.shape[0] == shape[0] and shape[1] in (None, array.shape[1])
    ):
        raise ValueError(
            f"`{name}` has shape {array.shape}, but the model and its clients need {shape}: transpose or crop it."
        )


def _count(module: Any) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()):,}"
