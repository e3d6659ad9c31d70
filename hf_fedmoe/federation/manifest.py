"""The list of a checkpoint's files by size and SHA-256, by which it knows whether it is what was written."""

import hashlib
import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .files import FileDigest


MANIFEST_NAME = "manifest.json"


class UnreadableManifestError(ValueError):
    """A manifest is missing or is not, to the byte, what was written."""


@dataclass(frozen=True)
class Manifest:
    """
    Lists what was written with a checkpoint.

    Args:
        round (`int`): The round after which it was written.
        files (`dict[str, FileDigest]`): Everything in its folder but the manifest itself, by path in the folder.
        clients (`dict[str, FileDigest]`): The files of the client store that it needs, by name.
    """

    round: int
    files: dict[str, FileDigest]
    clients: dict[str, FileDigest]


def write_manifest(folder: Path, round_index: int, clients: Mapping[str, FileDigest]) -> None:
    """Lists what is in the folder of a checkpoint, which must be complete."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:
        digests = dict(zip(paths, pool.map(FileDigest.of, paths), strict=True))
    files = {path.relative_to(folder).as_posix(): digest for path, digest in digests.items()}
    (folder / MANIFEST_NAME).write_text(_render(Manifest(round_index, files, dict(clients))))


def has_manifest(folder: Path) -> bool:
    """Tells whether a folder has a manifest, readable or not."""
    return (folder / MANIFEST_NAME).is_file()


def read_manifest(folder: Path) -> Manifest:
    """
    Reads the manifest of a checkpoint.

    Raises:
        `UnreadableManifestError`: When it is missing, or not what was written, or names a file outside its folder.
    """
    path = folder / MANIFEST_NAME
    if not has_manifest(folder):
        raise UnreadableManifestError(
            f"{MANIFEST_NAME} is missing: it was deleted, or an earlier version of hf_fedmoe wrote this checkpoint"
        )
    try:
        text = path.read_text()
        found = json.loads(text)
        files, clients = (
            {name: FileDigest(**digest) for name, digest in found[kind].items()} for kind in ("files", "clients")
        )
        manifest = Manifest(found["round"], files, clients)
        if text != _render(manifest):
            raise ValueError("its own checksum differs")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UnreadableManifestError(f"{MANIFEST_NAME} is not what was written ({error})") from error
    for name in [*manifest.files, *manifest.clients]:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
            raise UnreadableManifestError(f"{MANIFEST_NAME} names {name!r}, which is outside its folder")
    for name in manifest.clients:
        if "/" in name:
            raise UnreadableManifestError(f"{MANIFEST_NAME} names {name!r}, which is no file of a client")
    return manifest


def find_faults(folder: Path, clients_folder: Path) -> list[str]:
    """
    Compares all files of a checkpoint, those of clients in `clients_folder` included, with its manifest. Returns a
    phrase for each that is not as it was written: none for a sound checkpoint.
    """
    try:
        manifest = read_manifest(folder)
    except UnreadableManifestError as error:
        return [str(error)]
    named = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name)
    if named and int(named[1]) != manifest.round:
        return [f"{MANIFEST_NAME} is that of round {manifest.round}"]
    paths = {name: folder / name for name in manifest.files}
    paths |= {f"{clients_folder.name}/{name}": clients_folder / name for name in manifest.clients}
    digests = [*manifest.files.values(), *manifest.clients.values()]
    with ThreadPoolExecutor() as pool:
        found = pool.map(_fault, paths.values(), digests)
        return [f"{name} {fault}" for name, fault in zip(paths, found, strict=True) if fault is not None]


def _fault(path: Path, written: FileDigest) -> str | None:
    """Compares a file with what was written: a phrase that says what is wrong, or `None`."""
    if not path.is_file():
        return "is missing"
    if (size := path.stat().st_size) != written.size:
        return f"has {size} bytes, {MANIFEST_NAME} lists {written.size}"
    try:
        if FileDigest.of(path) != written:
            return f"has other content than {MANIFEST_NAME} lists"
    except OSError as error:
        return f"cannot be read ({error})"
    return None


def _render(manifest: Manifest) -> str:
    """The manifest as it stands in its file, with a checksum over itself: another byte anywhere is another text."""
    content = asdict(manifest)
    checksum = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "sha256": checksum}, indent=2) + "\n"
