"""State that stays with clients between rounds, on disk: a file for each client that has any."""

import uuid
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from .files import sync


class ClientStore:
    """
    Named tensors per client as safetensors files; a new version never overwrites an old one, so that every checkpoint
    keeps the versions its manifest names.

    Args:
        folder (`Path`): Where the files are; made with the first of them.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest: dict[int, str] = {}

    def get(self, client: int) -> dict[str, Tensor]:
        """The client's tensors, an empty dict if it has none."""
        if client not in self.manifest:
            return {}
        path = self.folder / self.manifest[client]
        if not path.is_file():
            raise FileNotFoundError(
                f"State of client {client} is missing ({path}): the folder `{self.folder.name}` belongs to the "
                "checkpoints beside it and must be kept and moved with them."
            )
        return load_file(path)

    def put(self, client: int, tensors: dict[str, Tensor]) -> str:
        """Writes a new version of the client's tensors; the name of the file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"client-{client:06d}-{uuid.uuid4().hex[:12]}.safetensors"
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, self.folder / name)
        self.manifest[client] = name
        return name

    def sync(self) -> None:
        """Forces the current versions to disk, before a checkpoint names them."""
        for name in self.manifest.values():
            sync(self.folder / name)

    def prune(self, manifests: list[dict[int, str]]) -> None:
        """Deletes the versions that neither these checkpoints' manifests nor the current one name."""
        if not self.folder.is_dir():
            return
        named = {name for manifest in [*manifests, self.manifest] for name in manifest.values()}
        for path in self.folder.glob("client-*.safetensors"):
            if path.name not in named:
                path.unlink()
