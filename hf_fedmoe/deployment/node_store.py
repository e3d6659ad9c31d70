"""The folder of a node: what stays with its client, for as long as the server may ask for a round again."""

import uuid
from pathlib import Path
from typing import Any

from torch import Tensor

from ..federation import ClientStore, read_json, write_json


STATE_NAME = "node.json"


class NodeStore:
    """
    A node's folder: who it is, and what stays with its client, in the files of a [`~federation.ClientStore`].

    What a client keeps of a round counts only if the server has accepted its upload, which it hears with its next
    task. So a version is kept for each round, until the server can go back before it no more.

    Args:
        folder (`Path`): Of this node alone.
        run (`str`): The federation's; another one finds nothing of this.
    """

    def __init__(self, folder: str | Path, run: str):
        self.folder, self.run = Path(folder), run
        self.store = ClientStore(self.folder / f"run-{run}")
        self.path = self.store.folder / STATE_NAME
        self.state: dict[str, Any] = read_json(self.path) or {"client": None, "versions": []}

    def get(self, client: int, accepted: int, oldest: int) -> dict[str, Tensor]:
        """
        Returns what the client kept after its last accepted upload, and forgets what cannot be asked for again.

        Args:
            client (`int`): Its number.
            accepted (`int`): The round of its last upload that was accepted, -1 if there is none.
            oldest (`int`): The first round that the server may ever ask for again.
        """
        versions = [version for version in self.state["versions"] if version[0] <= accepted]
        before = [version for version in versions if version[0] < oldest]
        self._write({"client": client, "versions": [*before[-1:], *versions[len(before) :]]})
        if not versions:
            return {}
        self.store.manifest = {client: versions[-1][1]}
        return self.store.get(client)

    def put(self, client: int, round_index: int, tensors: dict[str, Tensor]) -> None:
        """Keeps tensors of a round, on disk when this returns."""
        name = self.store.put(client, tensors)
        self.store.finish_writing()
        versions = [version for version in self.state["versions"] if version[0] < round_index]
        self._write({"client": client, "versions": [*versions, [round_index, name]]})

    def close(self) -> None:
        """Ends what writes files."""
        self.store.close()

    def _write(self, state: dict[str, Any]) -> None:
        self.state = state
        self.store.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.path, state)
        self.store.prune({name for _, name in state["versions"]})


def identity_of(folder: str | Path) -> str:
    """Returns by what a node is known again after a restart: a random text, which its folder keeps."""
    path = Path(folder) / STATE_NAME
    found = read_json(path)
    if found is None:
        found = {"node": uuid.uuid4().hex}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
    return str(found["node"])
