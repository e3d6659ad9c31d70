"""Narrower models inside a wider one: a window of each layer's channels, as HeteroFL and FedRolex choose it.

Shape suffixes: P elements of a row, m uploads.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .layout import StateLayout


# Where a narrower model's tensors stand in the wider ones of the same names: `wide[name][places[name]]`.
Places = dict[str, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Family:
    """
    The way in which the models of one type are made narrower.

    Args:
        widths (`Callable`): From a configuration and a capacity to the fields that change.
        units (`Callable`): From a configuration to how many neighbours of each dimension stay together, by the ends
            of tensors' names; 1 where no name fits.
    """

    widths: Callable[[Any, float], dict[str, Any]]
    units: Callable[[Any], dict[str, tuple[int, ...]]]


def cut(width: int, capacity: float) -> int:
    """ceil(capacity * width), where the rounding of a product such as 0.1 * 30 does not count as one more."""
    return math.ceil(round(capacity * width, 6))


def _small_cnn_widths(config: Any, capacity: float) -> dict[str, Any]:
    hidden = tuple(cut(width, capacity) for width in config.hidden_sizes)
    return {
        "channels": tuple(cut(width, capacity) for width in config.channels),
        "hidden_size": hidden[0] if isinstance(config.hidden_size, int) else hidden,
    }


def _small_cnn_units(config: Any) -> dict[str, tuple[int, ...]]:
    # Its columns are the flattened feature map: the positions of the first channel, then those of the second...
    return {"hidden.0.weight": (1, config.feature_size**2)}


def _resnet_widths(config: Any, capacity: float) -> dict[str, Any]:
    # A bottleneck has a quarter of its stage's channels.
    together = 4 if config.layer_type == "bottleneck" else 1
    return {
        "embedding_size": cut(config.embedding_size, capacity),
        "hidden_sizes": [together * cut(width // together, capacity) for width in config.hidden_sizes],
    }


def _bert_widths(config: Any, capacity: float) -> dict[str, Any]:
    # Heads keep their dimension, so that the hidden size is cut by whole ones.
    heads = cut(config.num_attention_heads, capacity)
    return {
        "num_attention_heads": heads,
        "hidden_size": heads * (config.hidden_size // config.num_attention_heads),
        "intermediate_size": cut(config.intermediate_size, capacity),
    }


def _bert_units(config: Any) -> dict[str, tuple[int, ...]]:
    head = config.hidden_size // config.num_attention_heads
    units: dict[str, tuple[int, ...]] = {"attention.output.dense.weight": (1, head)}
    for name in ("query", "key", "value"):
        units |= {f"attention.self.{name}.weight": (head, 1), f"attention.self.{name}.bias": (head,)}
    return units


_RESNET = Family(_resnet_widths, lambda config: {})
_BERT = Family(_bert_widths, _bert_units)
FAMILIES = {
    "bert": _BERT,
    "resnet": _RESNET,
    "roberta": _BERT,
    "small_cnn": Family(_small_cnn_widths, _small_cnn_units),
    "small_image_resnet": _RESNET,
}


def narrow_config(config: PreTrainedConfig, capacity: float) -> PreTrainedConfig:
    """
    The configuration of a model whose layers have the share `capacity` of the channels, rounded up; the classes stay
    all. Raises `ValueError` for a type of model that is not in `FAMILIES`.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"`model` is of the type {config.model_type!r}, of which no narrower model can be made: choose one of "
            f"{', '.join(FAMILIES)}."
        )
    narrow = copy.deepcopy(config)
    if capacity < 1:
        for name, value in FAMILIES[config.model_type].widths(config, capacity).items():
            setattr(narrow, name, value)
    return narrow


def narrow_model(model: PreTrainedModel, capacity: float) -> PreTrainedModel:
    """
    A model of the class of `model` with random weights and the share `capacity` of its channels. What its narrower
    layers give out is multiplied by wide / narrow, so that the next layer, which sums over fewer channels, receives
    as much as in the wide model.
    """
    narrow = type(model)(narrow_config(model.config, capacity))
    narrow.to(model.dtype)  # type: ignore[arg-type]  # transformers' wrapper hides that it is a method
    for module, scale in _scaled_layers(narrow, model):
        module.register_forward_hook(lambda module, inputs, output, scale=scale: output * scale)
    return narrow


@torch.no_grad()
def fold_scales_(narrow: PreTrainedModel, model: PreTrainedModel) -> None:
    """Multiplies the scales of a [`narrow_model`] of `model` into its weights, in place: checkpoints hold no more."""
    for module, scale in _scaled_layers(narrow, model):
        module._forward_hooks.clear()
        for parameter in module.parameters():
            parameter.mul_(scale)


def _scaled_layers(narrow: PreTrainedModel, model: PreTrainedModel) -> Iterator[tuple[nn.Module, float]]:
    """The layers of fewer outputs than in `model`, and wide / narrow of each."""
    wide_modules = dict(model.named_modules())
    for name, module in narrow.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            out = 1 if isinstance(module, nn.Embedding) else 0
            scale = wide_modules[name].weight.shape[out] / module.weight.shape[out]
            if scale != 1:
                yield module, scale


def narrow_layout(model: PreTrainedModel, capacity: float) -> StateLayout:
    """
    The layout of [`narrow_model`], without its memory. Raises `ValueError` when so narrow a model has other layers, as
    a ResNet whose first stage is as wide as its stem needs no shortcut there.
    """
    with torch.device("meta"):
        narrow = type(model)(narrow_config(model.config, capacity))
        narrow.to(model.dtype)  # type: ignore[arg-type]  # as above
        layout = StateLayout.of(narrow)
    names, wide_names = ({slot.name for slot in slots} for slots in (layout.slots, StateLayout.of(model).slots))
    if names != wide_names:
        raise ValueError(
            f"At a capacity of {capacity} a {type(model).__name__} of these widths loses or gains "
            f"`{min(names ^ wide_names)}`: choose a larger one of `capacities`, or a wider model."
        )
    return layout


def window(width: int, kept: int, shift: int, unit: int = 1, device: torch.device | None = None) -> Tensor:
    """
    The `kept` positions of `width` that start at the unit `shift`, counted from the first one again after the last;
    `unit` neighbours stay together.
    """
    units = (shift + torch.arange(kept // unit, device=device)) % (width // unit)
    return (units[:, None] * unit + torch.arange(unit, device=device)).flatten()


def sub_places(
    config: PreTrainedConfig, wide: StateLayout, narrow: StateLayout, shift: int, device: torch.device | None = None
) -> Places:
    """
    Finds the narrower model's tensors in the wider ones. Dimensions of one width and one unit have the same
    window, so that what one layer gives out is what the next one takes in, residual streams included.

    Args:
        config (`PreTrainedConfig`): Of the wide model.
        wide ([`StateLayout`]), narrow ([`StateLayout`]): Of the two models.
        shift (`int`): The unit at which windows start, modulo the number of units.
        device (`torch.device`, *optional*): Of the rows.
    """
    units = FAMILIES[config.model_type].units(config)
    places = {}
    for slot, kept in zip(wide.slots, narrow.slots, strict=True):
        ends = [end for end in units if slot.name.endswith(end)]
        sizes = units[ends[0]] if ends else (1,) * len(slot.shape)
        # Dimensions after the last one that is cut (a kernel's height and width) are taken whole without an index.
        last = max((i for i, size in enumerate(slot.shape) if size != kept.shape[i]), default=-1)
        index = [
            window(size, kept.shape[i], shift if size != kept.shape[i] else 0, sizes[i], device)
            for i, size in enumerate(slot.shape[: last + 1])
        ]
        places[slot.name] = torch.meshgrid(*index, indexing="ij") if len(index) > 1 else tuple(index)
    return places


@torch.no_grad()
def take_held(row_P: Tensor, wide: StateLayout, narrow: StateLayout, places: Places) -> Tensor:
    """The row of the narrower model out of that of the wide one."""
    held_P = row_P.new_zeros(narrow.size)
    views = wide.views(row_P)
    for name, view in narrow.views(held_P).items():
        view.copy_(views[name][places[name]])
    return held_P


@torch.no_grad()
def put_held_(row_P: Tensor, held_P: Tensor, wide: StateLayout, narrow: StateLayout, places: Places) -> None:
    """Writes the row of the narrower model into that of the wide one."""
    views = wide.views(row_P)
    for name, view in narrow.views(held_P).items():
        views[name][places[name]] = view


@torch.no_grad()
def average_held_(row_P: Tensor, uploads_mP: Tensor, places_m: list[Places], layout: StateLayout) -> Tensor:
    """
    row <- the mean of each element over the uploads that hold it, in place; what none holds stays. Running variances
    follow the rule for a mixture, as in [`fuse_`].

    Returns:
        `Tensor` of shape `[P]`: How many uploads hold each element.
    """
    sums_P, counts_P = torch.zeros_like(row_P), torch.zeros_like(row_P)
    sums, counts = layout.views(sums_P), layout.views(counts_P)
    mean_of = {variance.name: mean.name for mean, variance in layout.batchnorm}
    for upload_P, places in zip(uploads_mP, places_m, strict=True):
        upload = layout.views(upload_P)
        for name, place in places.items():
            held = upload[name][place]
            if name in mean_of:
                held = held + upload[mean_of[name]][place].square()
            sums[name][place] += held
            counts[name][place] += 1
    held_P = counts_P > 0
    sums_P /= counts_P.clamp_min(1)
    for variance, mean in mean_of.items():
        sums[variance].sub_(sums[mean].square()).clamp_min_(0)  # rounding may bring one of almost 0 below
    row_P.copy_(torch.where(held_P, sums_P, row_P))
    return counts_P
