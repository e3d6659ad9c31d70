"""
Compression of uploads: what a client sends is the encoded change of the model that it received.

Shape suffixes: P elements of a row, U elements of an update (what is compressed of a row, without padding).
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from .layout import StateLayout


BLOCK_SIZE = 256
COMPRESSIONS = ("none", "bf16", "int8", "top_k")


@dataclass(frozen=True)
class Codec:
    """
    A lossy code for updates.

    Args:
        encode (`Callable`): From an update `[U]` to the tensors that travel.
        decode (`Callable`): From those tensors and U to what the server reads.
        error_feedback (`bool`, *optional*, defaults to `False`):
            Whether a client keeps what was lost and adds it to its next update.
    """

    encode: Callable[[Tensor], dict[str, Tensor]]
    decode: Callable[[dict[str, Tensor], int], Tensor]
    error_feedback: bool = False


def make_codec(compression: str, top_k_share: float = 0.01) -> Codec | None:
    """
    The codec of that name, `None` for `"none"`.

    Args:
        compression (`str`):
            - `"none"`: the weights themselves, 4 bytes each.
            - `"bf16"`: 2 bytes each.
            - `"int8"`: 1 byte each and a scale for every 256 of them (Dettmers et al. 2022, "8-bit Optimizers via
              Block-wise Quantization", with even steps).
            - `"top_k"`: only the largest entries with their places, 8 bytes each; what is left out waits at the client
              for the next round (error feedback: Stich et al. 2018, "Sparsified SGD with Memory").
        top_k_share (`float`, *optional*, defaults to 0.01): Share of the entries that `"top_k"` sends.

    Raises:
        ValueError: Naming the field, its value and the remedy.
    """
    if compression not in COMPRESSIONS:
        raise ValueError(
            f"`upload_compression` is {compression!r}: choose one of {', '.join(map(repr, COMPRESSIONS))}."
        )
    if not 0 < top_k_share <= 1:
        raise ValueError(f"`top_k_share` is {top_k_share}: give a share in (0, 1], 0.01 sends every hundredth entry.")
    return {
        "none": None,
        "bf16": Codec(lambda update_U: {"values": update_U.bfloat16()}, lambda sent, _: sent["values"].float()),
        "int8": Codec(_encode_int8, _decode_int8),
        "top_k": Codec(lambda update_U: _encode_top_k(update_U, top_k_share), _decode_top_k, error_feedback=True),
    }[compression]


def compress_upload(
    codec: Codec,
    layout: StateLayout,
    row_P: Tensor,
    received_P: Tensor,
    residual_U: Tensor | None,
    shared: Collection[str] | None = None,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """
    Replaces a trained row by what the server reads of it: received + decode(encode(trained - received + residual)).

    The statistics of normalisation layers travel as they are: a variance with an error could be negative.

    Args:
        codec ([`Codec`]): The code.
        layout ([`StateLayout`]): Of the rows.
        row_P (`Tensor` of shape `[P]`): The trained model, changed in place.
        received_P (`Tensor` of shape `[P]`): What the client started from, known to the server.
        residual_U (`Tensor` of shape `[U]`, *optional*): What earlier rounds left out.
        shared (`Collection[str]`, *optional*): Names of the tensors that travel, if not all do; the same each time.

    Returns:
        `tuple[dict[str, Tensor], Tensor | None]`: The tensors that travel in the place of those that are encoded, and
        the new residual of a codec with error feedback.
    """
    trained, received = layout.views(row_P), layout.views(received_P)
    update_U = torch.cat([(trained[name] - received[name]).flatten() for name in encoded_names(layout, shared)])
    if residual_U is not None:
        update_U += residual_U.to(update_U.device)
    sent = codec.encode(update_U)
    read_U = read_upload_(codec, layout, row_P, received_P, sent, shared)
    return sent, update_U - read_U if codec.error_feedback else None


def read_upload_(
    codec: Codec,
    layout: StateLayout,
    row_P: Tensor,
    received_P: Tensor,
    sent: dict[str, Tensor],
    shared: Collection[str] | None = None,
) -> Tensor:
    """Writes what the server reads of an encoded update into a row, in place, and returns the update `[U]`."""
    trained, received = layout.views(row_P), layout.views(received_P)
    names = encoded_names(layout, shared)
    sizes = [trained[name].numel() for name in names]
    read_U = codec.decode(sent, sum(sizes))
    for name, part in zip(names, read_U.split(sizes), strict=True):
        torch.add(received[name], part.view_as(received[name]), out=trained[name])
    return read_U


def encoded_names(layout: StateLayout, shared: Collection[str] | None = None) -> list[str]:
    """Returns the names of the tensors that a codec encodes, of those that travel."""
    return [
        slot.name
        for slot in layout.slots
        if slot.name not in layout.statistics and (shared is None or slot.name in shared)
    ]


def _encode_int8(update_U: Tensor) -> dict[str, Tensor]:
    blocks = pad(update_U, (0, -len(update_U) % BLOCK_SIZE)).view(-1, BLOCK_SIZE)
    scales = blocks.abs().amax(1) / 127
    # A block of zeros has the scale 0; whatever it is divided by, its codes are 0.
    codes = (blocks / scales.clamp_min(torch.finfo(scales.dtype).tiny)[:, None]).round().to(torch.int8)
    return {"codes": codes.flatten()[: len(update_U)], "scales": scales}


def _decode_int8(sent: dict[str, Tensor], num_elements: int) -> Tensor:
    codes = pad(sent["codes"], (0, -num_elements % BLOCK_SIZE)).view(-1, BLOCK_SIZE)
    return (codes * sent["scales"][:, None]).flatten()[:num_elements]


def _encode_top_k(update_U: Tensor, share: float) -> dict[str, Tensor]:
    count = max(1, round(share * len(update_U)))
    places = update_U.abs().topk(count, sorted=False).indices
    return {"places": places.int(), "values": update_U[places]}


def _decode_top_k(sent: dict[str, Tensor], num_elements: int) -> Tensor:
    places = sent["places"].long()
    # A GPU that is asked to write beyond its memory does nothing more for this process.
    lowest, highest = torch.stack(torch.aminmax(places)).tolist() if len(places) else (0, 0)
    if len(places) and not 0 <= lowest <= highest < num_elements:
        raise IndexError(f"places from {lowest} to {highest}, of {num_elements} entries")
    return sent["values"].new_zeros(num_elements).scatter_(0, places, sent["values"])
