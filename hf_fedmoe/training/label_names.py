"""The classes' names: the model's and the data's are compared, and whichever there are go into what is saved."""

from collections.abc import Sequence

from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel

from ..data import FederatedDataset
from ..data.labels import name_some
from ..models import FedMoEPreTrainedModel
from ..models.configuration_checks import class_names


def settle_label_names(model: PreTrainedModel | PeftModel, data: FederatedDataset) -> None:
    """
    Gives the data's names of classes to a model that has none (`LABEL_0`, ...), to experts and adapters in it too.

    Args:
        model ([`~transformers.PreTrainedModel`] or `PeftModel`): Its configurations are changed.
        data ([`~data.FederatedDataset`]): With no more classes than the model.

    Raises:
        ValueError: When both have names and a class is not called the same in both. Case does not matter, and numbers
            of classes are no names.
    """
    known = class_names(model.config)
    own = [known[label] for label in range(len(known))]
    write_label_names(model, own)  # of which a user may have set one direction only
    if not data.has_label_names or (are_numbers(data.label_names) and not has_no_names(own)):
        return
    names = list(own)
    for label, name in enumerate(data.label_names):
        if own[label] == default_name(label) or are_numbers(own):
            names[label] = name
    _check_equal(names, data)
    write_label_names(model, names)


def default_name(label: int) -> str:
    """Returns what transformers calls a class without a name."""
    return f"LABEL_{label}"


def are_numbers(names: Sequence[str]) -> bool:
    """Tells whether classes are called by their numbers, as a `ClassLabel` without names calls them."""
    return list(names) == [str(label) for label in range(len(names))]


def has_no_names(names: Sequence[str]) -> bool:
    """Tells whether a model's names of classes are those that transformers makes up."""
    return list(names) == [default_name(label) for label in range(len(names))]


def write_label_names(model: PreTrainedModel | PeftModel, names: Sequence[str]) -> None:
    """Writes the classes' names into the model's configuration and into those of all classifiers in it but gates."""
    for config in _configurations(model):
        config.id2label = dict(enumerate(names))
        config.label2id = {name: label for label, name in enumerate(names)}


def _configurations(model: PreTrainedModel | PeftModel) -> list[PreTrainedConfig]:
    gates: set[int] = set()
    for module in model.modules():
        if isinstance(module, FedMoEPreTrainedModel) and module.config.gate == "model":
            gates |= {id(part) for part in module.gate.modules()}
    models = [part for part in model.modules() if isinstance(part, PreTrainedModel) and id(part) not in gates]
    found = {id(part.config): part.config for part in models}
    # Others are those of parts that know no classes, such as the towers of CLIP.
    return [config for config in found.values() if config.id2label == model.config.id2label]


def _check_equal(names: list[str], data: FederatedDataset) -> None:
    """Raises `ValueError` unless the classes of the data, and no others, are called as they are there."""
    ours, theirs = names, data.label_names
    folded = [[name.strip().casefold() for name in both] for both in (ours, theirs)]
    if all(len(set(both)) == len(both) for both in folded):  # some data has "A" and "a"
        ours, theirs = folded
    count, column = len(theirs), data.label_column
    if ours[:count] == theirs and not set(ours[count:]) & set(theirs):
        return
    begin = f"The model's classes are {name_some(names)}, the data's {name_some(data.label_names)}"
    load = "load it with `id2label=dict(enumerate(data.label_names))`"
    if set(theirs) <= set(ours) and len(set(ours)) == len(ours):
        raise ValueError(
            f"{begin}: in another order, so that the trained model would call them by wrong names. Number the data as "
            f"the model does, `dataset.align_labels_with_mapping(model.config.label2id, {column!r})`, before you make "
            f"the FederatedDataset; or, if what the model has learned of them does not matter, {load}."
        )
    label = next((label for label in range(count) if ours[label] != theirs[label]), count)
    raise ValueError(
        f"{begin}: class {label} is {names[label]!r} in the model. If the model is to learn the data's classes, "
        f"{load}. If they are the same classes, give the data the model's names, "
        f"`dataset.cast_column({column!r}, datasets.ClassLabel(names={names[:count]}))`."
    )
