"""The part of a checkpoint beside the model: strategy tensors, the clients' files, the run's identity."""

import json
from collections.abc import Collection
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
    state = {
        "identity": identity,
        "clients": {str(client): name for client, name in store.manifest.items()},
        # What a method keeps on the host although its models are on a GPU. Of a run on CPUs nobody can tell.
        "on_host": [name for name, tensor in server.tensors.items() if tensor.device != server.bank_SP.device],
    }
    (folder / STATE_NAME).write_text(json.dumps(state, indent=2) + "\n")


def has_federation(folder: Path) -> bool:
    """Tells whether a folder holds what a run needs to go on, besides the model."""
    return (folder / STATE_NAME).is_file()


def read_identity(folder: Path) -> dict[str, Any]:
    """Reads the identity of the run that wrote a checkpoint."""
    return json.loads((folder / STATE_NAME).read_text())["identity"]


def load_federation(folder: Path, server: Server, store: ClientStore) -> None:
    """Restores what [`save_federation`] wrote, where the bank is but for what was on the host beside a GPU."""
    tensors, state = load_file(folder / TENSORS_NAME), json.loads((folder / STATE_NAME).read_text())
    on_host = state.get("on_host", [])

    def named(prefix: str, on_host: Collection[str] = ()) -> dict[str, Tensor]:
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        # Copies: in a file tensors begin anywhere, and where they begin decides how sums of them are rounded.
        return {
            name: tensor.to("cpu" if name in on_host else server.bank_SP.device, copy=True)
            for name, tensor in own.items()
        }

    server.tensors = named(STRATEGY_PREFIX, on_host)
    server.integers = [named(f"{INTEGERS_PREFIX}{index}.") for index in range(len(server.integers))]
    store.manifest = {int(client): name for client, name in state["clients"].items()}
    store.digests = read_manifest(folder).clients
