"""The part of a checkpoint beside the model: strategy tensors, the clients' files, the run's identity."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from .client_store import ClientStore
from .contract import Server
from .manifest import read_manifest


TENSORS_NAME = "federation.safetensors"
STATE_NAME = "federation.json"
STRATEGY_PREFIX = "strategy."
INTEGERS_PREFIX = "integers."


def save_federation(folder: Path, server: Server, store: ClientStore, identity: dict[str, Any]) -> None:
    """
    Writes the server's state and the clients' manifest into a checkpoint folder.

    The model's own float32 tensors are in the folder already, as a Hugging Face model; here is what it does not hold.
    """
    tensors = {f"{STRATEGY_PREFIX}{name}": tensor.contiguous() for name, tensor in server.tensors.items()}
    for index, integers in enumerate(server.integers):
        tensors |= {f"{INTEGERS_PREFIX}{index}.{name}": tensor for name, tensor in integers.items()}
    save_file(tensors, folder / TENSORS_NAME)
    state = {"identity": identity, "clients": {str(client): name for client, name in store.manifest.items()}}
    (folder / STATE_NAME).write_text(json.dumps(state, indent=2) + "\n")


def has_federation(folder: Path) -> bool:
    """Tells whether a folder holds what a run needs to go on, besides the model."""
    return (folder / STATE_NAME).is_file()


def read_identity(folder: Path) -> dict[str, Any]:
    """Reads the identity of the run that wrote a checkpoint."""
    return json.loads((folder / STATE_NAME).read_text())["identity"]


def load_federation(folder: Path, server: Server, store: ClientStore) -> None:
    """Restores what [`save_federation`] wrote."""
    tensors = load_file(folder / TENSORS_NAME)

    def named(prefix: str) -> dict[str, Tensor]:
        return {
            # Copies: in a file tensors begin anywhere, and where they begin decides how sums of them are rounded.
            name.removeprefix(prefix): tensor.to(server.bank_SP.device, copy=True)
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }

    server.tensors = named(STRATEGY_PREFIX)
    server.integers = [named(f"{INTEGERS_PREFIX}{index}.") for index in range(len(server.integers))]
    clients = json.loads((folder / STATE_NAME).read_text())["clients"]
    store.manifest = {int(client): name for client, name in clients.items()}
    store.digests = read_manifest(folder).clients
