"""What a checkpoint holds beside the model: strategy tensors, the clients' manifest, the run's identity."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from ..strategies import Server
from .client_store import ClientStore


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


def read_manifest(folder: Path) -> dict[int, str]:
    """The client files that a checkpoint needs; empty for a folder that is no federated checkpoint."""
    path = folder / STATE_NAME
    if not path.is_file():
        return {}
    return {int(client): name for client, name in json.loads(path.read_text())["clients"].items()}


def check_identity(folder: Path, identity: dict[str, Any]) -> None:
    """
    Raises `ValueError` when the checkpoint was written by another configuration: it names the first setting that
    differs, both values, and what to do.
    """
    path = folder / STATE_NAME
    if not path.is_file():
        raise ValueError(
            f"`resume_from_checkpoint` names {folder.name}, which has no {STATE_NAME}: it is not a checkpoint of a "
            "federated run. To start from a model, load it with `from_pretrained` instead."
        )
    saved = json.loads(path.read_text())["identity"]
    # JSON knows lists only, settings may be tuples.
    for name, value in json.loads(json.dumps(identity)).items():
        # A setting that did not exist when the checkpoint was written had no other value.
        if saved.get(name, value) != value:
            raise ValueError(
                f"The checkpoint {folder.name} was written with {name} = {saved[name]!r}, this run has {value!r}: "
                "resume with the settings of that run, or start a new one in another `output_dir`."
            )


def load_federation(folder: Path, server: Server, store: ClientStore) -> None:
    """Restores what [`save_federation`] wrote."""
    tensors = load_file(folder / TENSORS_NAME)

    def named(prefix: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(prefix): tensor.to(server.bank_SP.device)
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }

    server.tensors = named(STRATEGY_PREFIX)
    server.integers = [named(f"{INTEGERS_PREFIX}{index}.") for index in range(len(server.integers))]
    store.manifest = read_manifest(folder)
