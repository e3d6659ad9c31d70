"""
Refuses what a `config.json` must not ask for, before a model is built from it. Flat: the file travels to the Hub as it
is.
"""

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, PreTrainedConfig


AutoClassifier = type[AutoModelForImageClassification] | type[AutoModelForSequenceClassification]

# Whole models, or layers, each of which is built as a Python object before any weight is read.
MAX_MODULES = 1024
MAX_WIDTH = 2**24
MAX_LABELS = 10**6

# Models that consist of classifiers: none of them is a classifier in another one.
COMPOSITE_TYPES = frozenset(
    ("adapted_classifier", "classifier_ensemble", "fedmoe", "fedmoe_causal", "multi_head_classifier", "paired_experts")
)
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depths")
_WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "n_embd", "n_head")


def built(config: dict | PreTrainedConfig | None) -> PreTrainedConfig:
    """Narrows the type of a sub-configuration to what `__post_init__` has made of it."""
    assert isinstance(config, PreTrainedConfig)
    return config


def class_names(config: PreTrainedConfig) -> dict[int, str]:
    """The names of the classes by their numbers, a `dict` of its own."""
    return {int(index): name for index, name in (config.id2label or {}).items()}


def check_integer(field: str, value: Any, low: int = 1, high: int = MAX_WIDTH) -> None:
    """Raises a `ValueError` unless `value` is an integer from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"`{field}` is {value!r}: pass an integer of at least {low}.")
    if value > high:
        raise ValueError(f"`{field}` is {value!r}: pass an integer of at most {high}, a model of more is never built.")


def check_number(field: str, value: Any) -> None:
    """Raises a `ValueError` unless `value` is a number; a NaN is one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"`{field}` is {value!r}: pass a number.")


def check_weights(place: str, model: nn.Module) -> None:
    """Raises a `ValueError` when the weights of `model` are not there, or are no tensors that can be trained."""
    if getattr(model, "hf_device_map", None) is None and any(weight.is_meta for weight in model.parameters()):
        raise ValueError(
            f"`{place}` has no weights, it is on the device 'meta': load it with `from_pretrained`, outside of "
            '`torch.device("meta")`.'
        )
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"`{place}` holds at `{name}` a {type(value).__name__} where there should be weights, as quantised "
                "layers do: load it without quantisation."
            )


def check_choice(field: str, value: Any, allowed: Collection[str]) -> None:
    """Raises a `ValueError` unless `value` is one of the names."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"`{field}` is {value!r}: pass one of {', '.join(map(repr, allowed))}.")


def check_classifier_config(field: str, config: Any) -> None:
    """
    Raises a `ValueError` unless `config` can be that of a single classifier: no model of models, and of a depth that
    can be built. Called before a `dict` becomes a configuration, which nested ones would do to any depth.
    """
    if config is None:
        return
    if not isinstance(config, (dict, PreTrainedConfig)):
        raise ValueError(f"`{field}` is {config!r}: pass the configuration of a classifier.")
    values = config if isinstance(config, dict) else vars(config)
    model_type = values.get("model_type") if isinstance(config, dict) else config.model_type
    if model_type in COMPOSITE_TYPES:
        raise ValueError(
            f"`{field}` is that of a {model_type!r}, which consists of classifiers itself: pass the configuration of "
            "a single classifier."
        )
    if isinstance(config, dict) and not model_type and config:
        raise ValueError(f"`{field}` has no `model_type`: name the architecture, for example 'bert'.")
    check_sizes(field, values)
    check_labels(values.get("num_labels"), values.get("id2label"), None, f"{field}.")


def check_sizes(field: str, values: dict[str, Any]) -> None:
    """Raises a `ValueError` when a configuration, as a `dict`, asks for more layers or width than can be built."""
    for name in _DEPTHS:
        depth = values.get(name)
        for value in depth if isinstance(depth, (list, tuple)) else [depth]:
            if isinstance(value, int) and value > MAX_MODULES:
                raise ValueError(f"`{field}.{name}` is {depth!r}: pass at most {MAX_MODULES} layers.")
    for name in _WIDTHS:
        if isinstance(values.get(name), int):
            check_integer(f"{field}.{name}", values[name])


def check_labels(num_labels: Any, id2label: Any, label2id: Any, place: str = "") -> None:
    """
    Raises a `ValueError` unless the classes are 0, 1, ... C - 1 and both maps, where both have names of their own, say
    the same.
    """
    if num_labels is not None:
        check_integer(f"{place}num_labels", num_labels, 0, MAX_LABELS)
    for name, labels in (("id2label", id2label), ("label2id", label2id)):
        if labels is not None and not isinstance(labels, dict):
            raise ValueError(f"`{place}{name}` is {labels!r}: pass a `dict`.")
    try:
        names = None if id2label is None else {int(index): label for index, label in id2label.items()}
        indices = None if label2id is None else {label: int(index) for label, index in label2id.items()}
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`{place}id2label` is {id2label!r} and `{place}label2id` {label2id!r}: classes are numbers, {error}."
        ) from error
    if names is not None and names.keys() != set(range(len(names))):
        raise ValueError(
            f"`{place}id2label` names the classes {sorted(names)}: pass names for 0 to {len(names) - 1}, all of them."
        )
    if names is None or indices is None or all(str(label).startswith("LABEL_") for label in indices):
        return
    for label, index in indices.items():
        if names.get(index) != label:
            raise ValueError(
                f"`{place}label2id` says that {label!r} is class {index}, but `{place}id2label` calls that "
                f"{names.get(index)!r}: make them say the same, or leave `label2id` out."
            )
