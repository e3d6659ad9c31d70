"""State that stays with clients between rounds, on disk: a file for each client that has any."""

import shutil
import uuid
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from .files import FileDigest, sync


class ClientStore:
    """
    Named tensors per client as safetensors files; a new version never overwrites an old one, so that every checkpoint
    keeps the versions its manifest names. What neither a checkpoint nor the run names any more is deleted.

    Args:
        folder (`Path`): Where the files are; made with the first of them.

    Attributes:
        manifest (`dict[int, str]`): The current file of each client that has one.
        digests (`dict[str, FileDigest]`): Of the files that a checkpoint names, see [`ClientStore.seal`].
        named (`frozenset[str]`, *optional*): Files that checkpoints need. `None` where another process deletes.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest: dict[int, str] = {}
        self.digests: dict[str, FileDigest] = {}
        self.named: frozenset[str] | None = None

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
        """Writes a new version of the client's tensors, whole or not at all; returns the name of the file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"client-{client:06d}-{uuid.uuid4().hex[:12]}.safetensors"
        try:
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, self.folder / name)
        except BaseException:
            (self.folder / name).unlink(missing_ok=True)
            raise
        return name

    def replace(self, written: dict[int, str]) -> None:
        """Makes these versions the current ones, and deletes those in their place that no checkpoint names."""
        replaced = [self.manifest[client] for client in written if client in self.manifest]
        self.manifest |= written
        if self.named is not None:
            self._delete(name for name in replaced if name not in self.named)

    def seal(self) -> dict[str, FileDigest]:
        """Forces the current versions to disk, before a checkpoint names them; returns by what each is known again."""
        new = [name for name in self.manifest.values() if name not in self.digests]
        if new:
            with ThreadPoolExecutor() as pool:
                digests = list(pool.map(self._seal, new))
            sync(self.folder)
            self.digests |= dict(zip(new, digests, strict=True))
        self.digests = {name: self.digests[name] for name in self.manifest.values()}
        return self.digests

    def prune(self, named: Collection[str]) -> None:
        """Deletes the versions that neither checkpoints, as `named` here, nor the run names."""
        self.named = frozenset(named)
        kept = self.named.union(self.manifest.values())
        self._delete(path.name for path in self.folder.glob("client-*.safetensors") if path.name not in kept)
        # What safetensors had begun to write under a name of its own when the process was killed.
        self._delete(path.name for path in self.folder.glob(".tmp*"))

    def adopt(self, folder: Path, names: Iterable[str]) -> None:
        """Copies files of the store in `folder`, from which a run in another place goes on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            if not (self.folder / name).exists():
                unfinished = self.folder / f"client-copy-{uuid.uuid4().hex}.safetensors"
                shutil.copyfile(folder / name, unfinished)
                unfinished.rename(self.folder / name)

    def _seal(self, name: str) -> FileDigest:
        sync(self.folder / name)
        return FileDigest.of(self.folder / name)

    def _delete(self, names: Iterable[str]) -> None:
        for name in names:
            (self.folder / name).unlink(missing_ok=True)
