"""
Messages between server and nodes: facts as JSON and tensors, in the form of a file of safetensors. It is written and
read here, since models are long: written in pieces, and read where it lies, without a copy.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


# Where a file's metadata has the facts.
FACTS = "hf_fedmoe"
# Version of what messages mean; another one is refused.
PROTOCOL = 1
# Bytes of a piece of a message, but for the first one, which is its header, and the last one.
PIECE_BYTES = 20 * 2**20
_LENGTH_BYTES = 8
# The types of safetensors that travel; the longest ones lie first, so that each tensor is aligned.
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64, "BOOL": torch.bool},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8},
}
# More dimensions, or strides, no tensor has.
_MOST_DIMENSIONS, _LARGEST = 64, 2**63 - 1
# Characters of an error, which may quote what somebody sent.
_LONGEST = 1000


class MessageError(ValueError):
    """
    Bytes that are no message, or none that is understood here.

    Args:
        fault (`str`): Told in one line of printable characters and cut where it is long: who sent the bytes must not
            write the log.
    """

    def __init__(self, fault: str):
        end = "..." if len(fault) > _LONGEST else ""
        line = " ".join(fault[:_LONGEST].split())
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line) + end)


@dataclass
class Message:
    """
    One message.

    Args:
        kind (`str`): `"hello"`, `"train"`, `"test"`, and in answers `"node"`, `"trained"`, `"tested"` or `"failed"`.
        facts (`dict[str, Any]`, *optional*): Values that JSON knows.
        tensors (`dict[str, Tensor]`, *optional*): By names with a part before the first slash, see `travel.py`.
    """

    kind: str
    facts: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def pieces(self) -> Iterator[bytes]:
        """
        Gives the message as bytes, in pieces that are made one by one. Tensors begin with a piece of their own, so
        that messages with the same tensors have the same pieces but for the first one.
        """
        facts = json.dumps({"protocol": PROTOCOL, "kind": self.kind, **self.facts})
        tensors = sorted(self.tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
        names = {dtype: name for name, dtype in DTYPES.items()}
        header: dict[str, Any] = {"__metadata__": {FACTS: facts}}
        end = 0
        for name, tensor in tensors:
            begin, end = end, end + tensor.nbytes
            header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        written = json.dumps(header).encode()
        written += b" " * (-len(written) % _LENGTH_BYTES)
        yield len(written).to_bytes(_LENGTH_BYTES, "little") + written
        parts, size = list[memoryview](), 0
        for _, tensor in tensors:
            left = _bytes(tensor)
            while size + len(left) >= PIECE_BYTES:
                parts.append(left[: PIECE_BYTES - size])
                left = left[PIECE_BYTES - size :]
                yield b"".join(parts)
                parts.clear()
                size = 0
            parts.append(left)
            size += len(left)
        if size:
            yield b"".join(parts)

    def pack(self) -> bytes:
        """Returns the message as bytes."""
        return b"".join(self.pieces())

    @classmethod
    def unpack(cls, packed: bytes | bytearray) -> "Message":
        """
        Reads bytes that somebody sent; raises [`MessageError`] if they are no message. Nothing in them is run. Of a
        `bytearray` tensors are views, which keep all of it.
        """
        try:
            length = int.from_bytes(packed[:_LENGTH_BYTES], "little")
            header = json.loads(packed[_LENGTH_BYTES : _LENGTH_BYTES + length])
            facts = json.loads(header.pop("__metadata__")[FACTS])
            kind, protocol = str(facts.pop("kind")), facts.pop("protocol")
            buffer = packed if isinstance(packed, bytearray) else bytearray(packed)
            tensors = _views(header, memoryview(buffer), _LENGTH_BYTES + length)
        # JSON says a kind of RuntimeError of texts that are too deep.
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise MessageError(f"{len(packed)} bytes are no message: {type(error).__name__}: {error}") from error
        if protocol != PROTOCOL:
            raise MessageError(
                f"The message has version {protocol!r}, this hf_fedmoe reads version {PROTOCOL}: install one version "
                "at the server and at all nodes."
            )
        return cls(kind, facts, tensors)


def _bytes(tensor: Tensor) -> memoryview:
    """Returns the memory of a tensor, or of a copy where it lies in another order or on a device."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _views(header: dict[str, Any], buffer: memoryview, start: int) -> dict[str, Tensor]:
    """Returns the tensors that a header tells of; raises `ValueError` unless they fill the bytes from `start` on."""
    tensors, end = dict[str, Tensor](), start
    for name, told in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (begin, stop) = DTYPES[told["dtype"]], told["shape"], told["data_offsets"]
        known = len(shape) <= _MOST_DIMENSIONS and all(
            type(number) is int and number >= 0 for number in (*shape, begin)
        )
        if not known or math.prod(max(number, 1) for number in shape) > _LARGEST:
            raise ValueError(f"{name!r} has the shape {shape} at {begin}")
        size = math.prod(shape) * dtype.itemsize
        aligned = size == 0 or end % dtype.itemsize == 0
        if start + begin != end or begin + size != stop or start + stop > len(buffer) or not aligned:
            raise ValueError(f"{name!r} lies at {begin} to {stop}, and {size} bytes from {end - start} on are due")
        # PyTorch reads no buffer that is empty.
        flat = torch.frombuffer(buffer[end : end + size], dtype=dtype) if size else torch.empty(0, dtype=dtype)
        tensors[name], end = flat.view(shape), end + size
    if end != len(buffer):
        raise ValueError(f"{len(buffer) - end} bytes follow the last tensor")
    return tensors
