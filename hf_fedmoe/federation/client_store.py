"""State that stays with clients between rounds, on disk: a file for each client that has any."""

import shutil
import uuid
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from .files import FileDigest, sync
from .write_behind import WriteBehind, host_copies


# How much of clients' tensors is in memory because the disk has not got them yet: three of GPT-2-medium.
MAX_UNWRITTEN_BYTES = 4 * 2**30


class ClientStore:
    """
    Named tensors per client as safetensors files; a new version never overwrites an old one, so that every checkpoint
    keeps the versions its manifest names. What neither a checkpoint nor the run names any more is deleted.

    Files are written and deleted behind the run, by threads: a version is deleted when the one in its place is there.
    What fails there is raised by the next [`ClientStore.put`], [`ClientStore.finish_writing`], [`ClientStore.seal`] or
    [`ClientStore.close`].

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
        self._behind = WriteBehind(MAX_UNWRITTEN_BYTES)
        # By name of the file; the threads take out what is on disk.
        self._unwritten: dict[str, dict[str, Tensor]] = {}

    def get(self, client: int) -> dict[str, Tensor]:
        """The client's tensors, an empty dict if it has none."""
        if client not in self.manifest:
            return {}
        unwritten = self._unwritten.get(self.manifest[client])
        if unwritten is not None:
            # As from a file: whoever changes them in place changes nothing that is still to be written.
            return {name: tensor.clone() for name, tensor in unwritten.items()}
        path = self.folder / self.manifest[client]
        if not path.is_file():
            raise FileNotFoundError(
                f"State of client {client} is missing ({path}): the folder `{self.folder.name}` belongs to the "
                "checkpoints beside it and must be kept and moved with them."
            )
        # In a file they begin anywhere, and where they begin decides how sums of them are rounded.
        return {name: tensor.clone() for name, tensor in load_file(path).items()}

    def put(self, client: int, tensors: dict[str, Tensor]) -> str:
        """
        Has a new version of the client's tensors written, whole or not at all; returns the name of the file. They are
        copied at once, and may change afterwards.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"client-{client:06d}-{uuid.uuid4().hex[:12]}.safetensors"
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        self._behind.make_room(num_bytes)
        self._unwritten[name] = host_copies(tensors)
        self._behind.add(num_bytes, self._write, name)
        return name

    def replace(self, written: dict[int, str]) -> None:
        """Makes these versions the current ones, and deletes those in their place that no checkpoint names."""
        replaced = {self.manifest[client]: name for client, name in written.items() if client in self.manifest}
        self.manifest |= written
        if self.named is not None and replaced:
            self._behind.add_last(self._delete_replaced, replaced)

    def go_on_from(self, ended: "ClientStore") -> None:
        """Takes the current versions of a store of the same folder, and those that it could not write."""
        self.manifest, self._unwritten = ended.manifest, ended._unwritten

    def finish_writing(self) -> None:
        """Waits until all versions are on disk, where other processes can read them."""
        self._behind.finish()

    def close(self) -> None:
        """Ends the threads when all versions are on disk. What is there can still be read."""
        self._behind.close()

    def seal(self) -> dict[str, FileDigest]:
        """Forces the current versions to disk, before a checkpoint names them; returns by what each is known again."""
        self.finish_writing()
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
        self._behind.rest()  # or what is being written were taken for a leftover
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

    def _write(self, name: str) -> None:
        try:
            save_file(self._unwritten[name], self.folder / name)
        except BaseException:
            (self.folder / name).unlink(missing_ok=True)
            raise
        del self._unwritten[name]

    def _delete_replaced(self, replaced: dict[str, str]) -> None:
        """Deletes versions, given with those in their place, unless a checkpoint or a failed write is in the way."""
        named = self.named
        assert named is not None  # or nothing is replaced
        self._delete(old for old, new in replaced.items() if old not in named and new not in self._unwritten)

    def _seal(self, name: str) -> FileDigest:
        sync(self.folder / name)
        return FileDigest.of(self.folder / name)

    def _delete(self, names: Iterable[str]) -> None:
        for name in names:
            (self.folder / name).unlink(missing_ok=True)
