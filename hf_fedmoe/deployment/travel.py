"""
A client's model as named tensors that travel: those of a row, integer buffers, and tensors beside the model.

Shape suffix: P elements of a model's row.
"""

import hashlib
from collections.abc import Collection

import torch
from torch import Tensor, nn

from ..models import AdapterExpert
from ..weights import Payload, StateLayout, encoded_names


# Parts of the names of tensors in messages.
ROW, INTEGERS, BESIDE, ENCODED = "row/", "integers/", "beside/", "encoded/"


def payload_tensors(
    payload: Payload, layout: StateLayout, names: Collection[str], rank: int | None = None
) -> dict[str, Tensor]:
    """
    Returns a payload as the tensors of a message.

    Args:
        payload ([`~weights.Payload`]): What is sent.
        layout ([`~weights.StateLayout`]): Of its row.
        names (`Collection[str]`): Tensors of the model that travel.
        rank (`int`, *optional*): Of the adapters: directions beyond it, which are zeros, stay behind.
    """
    views = _cut(layout.views(payload.row_P), layout, rank)
    encoded = set(encoded_names(layout, names)) if payload.encoded else set()
    tensors = {f"{ROW}{name}": view for name, view in views.items() if name in names and name not in encoded}
    tensors |= {f"{ENCODED}{name}": tensor for name, tensor in payload.encoded.items()}
    tensors |= {f"{INTEGERS}{name}": tensor for name, tensor in payload.integers.items() if name in names}
    # A copy: it may be a part of the row, and a file of safetensors has no memory twice.
    return tensors | {f"{BESIDE}{name}": tensor.clone() for name, tensor in payload.tensors.items()}


def write_row_(row_P: Tensor, tensors: dict[str, Tensor], layout: StateLayout, rank: int | None = None) -> None:
    """Writes the tensors of a message that belong to a row, in place; the others of the row stay."""
    views = layout.views(row_P)
    for name, view in _cut(views, layout, rank).items():
        if f"{ROW}{name}" in tensors:
            views[name].zero_()
            view.copy_(tensors[f"{ROW}{name}"])


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Returns the tensors of a message whose names begin so, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def num_bytes(tensors: dict[str, Tensor]) -> int:
    """Counts what the tensors of a message weigh."""
    return sum(tensor.nbytes for tensor in tensors.values())


def shapes_due(layout: StateLayout, names: Collection[str], rank: int | None = None) -> dict[str, torch.Size]:
    """Returns the shapes of a row's tensors as they travel, by their names in messages."""
    meta_P = torch.empty(layout.size, dtype=layout.dtype, device="meta")
    views = _cut(layout.views(meta_P), layout, rank)
    return {f"{ROW}{name}": view.shape for name, view in views.items() if name in names}


def _cut(views: dict[str, Tensor], layout: StateLayout, rank: int | None) -> dict[str, Tensor]:
    """Returns views of a row without the directions of adapters beyond a rank."""
    views = dict(views)
    for A, B in layout.lora if rank is not None else ():
        views[A.name], views[B.name] = views[A.name][:rank], views[B.name][:, :rank]
    return views


# Hashes


def layout_digest(layout: StateLayout) -> str:
    """Hashes the names, shapes and types of what travels, which server and nodes must have in common."""
    slots = [(slot.name, tuple(slot.shape)) for slot in layout.slots]
    return _hex(repr((slots, layout.integers, str(layout.dtype))).encode())


def tensor_digests(row_P: Tensor, layout: StateLayout, names: Collection[str]) -> dict[str, str]:
    """Hashes tensors of a row, by their names."""
    return {name: digest(view) for name, view in layout.views(row_P).items() if name in names}


def frozen_digest(module: nn.Module) -> str:
    """
    Hashes the frozen parameters of a client's model, the base under an adapter among them: nobody trains them, so they
    do not travel, and must be the same everywhere.
    """
    total = hashlib.sha256()
    for name, parameter in _all_parameters(module):
        if not parameter.requires_grad:
            total.update(f"{name} {tuple(parameter.shape)} {digest(parameter)}".encode())
    return total.hexdigest()[:32]


def _all_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    own = list(module.named_parameters())
    if not isinstance(module, AdapterExpert):
        return own
    # Other adapters are other clients' matter, and PEFT's copies of the base's head are never used.
    base = [
        (name, parameter)
        for name, parameter in module.peft_model.named_parameters()
        if not parameter.requires_grad and "original_module" not in name and "lora_" not in name
    ]
    return [*own, *base]


def digest(tensor: Tensor) -> str:
    """Hashes a tensor's memory."""
    return _hex(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def _hex(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
