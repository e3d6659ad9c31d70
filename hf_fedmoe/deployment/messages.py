"""Messages between server and nodes: facts as JSON and tensors, in the form of a file of safetensors."""

import json
from dataclasses import dataclass, field
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor


# Where a file's metadata has the facts.
FACTS = "hf_fedmoe"
# Version of what messages mean; another one is refused.
PROTOCOL = 1
_LENGTH_BYTES = 8
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
        kind (`str`): `"hello"`, `"train"`, and in answers `"node"`, `"trained"` or `"failed"`.
        facts (`dict[str, Any]`, *optional*): Values that JSON knows.
        tensors (`dict[str, Tensor]`, *optional*): By names with a part before the first slash, see `travel.py`.
    """

    kind: str
    facts: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def pack(self) -> bytes:
        """Returns the message as bytes."""
        facts = json.dumps({"protocol": PROTOCOL, "kind": self.kind, **self.facts})
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        return save(tensors, {FACTS: facts})

    @classmethod
    def unpack(cls, packed: bytes) -> "Message":
        """Reads bytes that somebody sent; raises [`MessageError`] if they are no message. Nothing in them is run."""
        try:
            length = int.from_bytes(packed[:_LENGTH_BYTES], "little")
            header = json.loads(packed[_LENGTH_BYTES : _LENGTH_BYTES + length])
            facts = json.loads(header["__metadata__"][FACTS])
            kind, protocol = str(facts.pop("kind")), facts.pop("protocol")
            tensors = load(packed)
        # PyTorch says a RuntimeError of shapes beyond all memory, JSON of texts too deep a kind of it.
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise MessageError(f"{len(packed)} bytes are no message: {type(error).__name__}: {error}") from error
        if protocol != PROTOCOL:
            raise MessageError(
                f"The message has version {protocol!r}, this hf_fedmoe reads version {PROTOCOL}: install one version "
                "at the server and at all nodes."
            )
        return cls(kind, facts, tensors)
