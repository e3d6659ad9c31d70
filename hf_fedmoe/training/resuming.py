"""Finds the checkpoint from which a run goes on: the one asked for, if every byte of it is what was written."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..federation import find_faults, has_federation, has_manifest


logger = logging.get_logger(__name__)

# The underscore keeps it from the Hub: `push_to_hub` leaves out `_*`, and clients' own models belong to nobody else.
CLIENTS_FOLDER = "_clients"
LATEST_SOUND = "latest_sound"
# Damaged files that an error names; a folder that was moved without its clients may lack thousands.
MAX_FAULTS = 5


def numbered_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, by their rounds."""
    if not folder.is_dir():
        return []
    matches = ((path, re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)) for path in folder.iterdir())
    found = {path: int(match[1]) for path, match in matches if match and path.is_dir()}
    return sorted(found, key=found.__getitem__)


def choose_checkpoint(wanted: str | os.PathLike | bool, output_dir: Path) -> Path:
    """
    Returns the checkpoint that `train(resume_from_checkpoint=wanted)` means: a folder, `True` for the newest in
    `output_dir`, `"latest_sound"` for the newest there that is as it was written.

    Raises:
        `ValueError`: When there is none, or one of its files is not what was written: names the file, and the newest
            sound checkpoint.
    """
    found = numbered_checkpoints(output_dir)
    if wanted is True or wanted == LATEST_SOUND:
        if not found:
            raise ValueError(f"`output_dir` {str(output_dir)!r} holds no checkpoint to resume from.")
        if wanted == LATEST_SOUND:
            return _latest_sound(found, output_dir)
        folder = found[-1]
    elif isinstance(wanted, str | os.PathLike) and str(wanted) and Path(wanted).is_dir():
        folder = Path(wanted)
    else:
        raise ValueError(
            f"`resume_from_checkpoint` is {wanted!r}, which is no folder: give that of a checkpoint, `True` for the "
            f'newest one in `output_dir`, or "{LATEST_SOUND}" for the newest one there that is undamaged.'
        )
    _check_kind(folder)
    if faults := _faults(folder):
        others = (other for other in reversed(found) if not other.samefile(folder))
        sound = next((other for other in others if has_federation(other) and not _faults(other)), None)
        remedy = f"There is no sound one in `output_dir` {str(output_dir)!r}: start anew in another one."
        if sound:
            remedy = f"The newest sound one is {sound.name}: `train(resume_from_checkpoint={str(sound)!r})`."
        raise ValueError(f"{folder.name} is damaged: {in_words(faults)}. {remedy}")
    if not has_federation(folder):
        raise ValueError(
            f"{folder.name} holds a model only, `save_only_model`: load that with `from_pretrained`, "
            "no run can go on from it."
        )
    return folder


def in_words(faults: list[str]) -> str:
    """Names the first few faults, and how many more there are."""
    more = len(faults) - MAX_FAULTS
    return "; ".join(faults[:MAX_FAULTS]) + (f"; and {more} more" if more > 0 else "")


def _latest_sound(found: Iterable[Path], output_dir: Path) -> Path:
    for folder in reversed(list(found)):
        if not (has_federation(folder) or has_manifest(folder)):
            logger.warning(f"{folder.name} is passed over: it is no checkpoint of a federated run.")
        elif faults := _faults(folder):
            logger.warning(f"{folder.name} is passed over, it is damaged: {in_words(faults)}.")
        elif not has_federation(folder):
            logger.warning(f"{folder.name} is passed over: it holds a model only, `save_only_model`.")
        else:
            return folder
    raise ValueError(f"`output_dir` {str(output_dir)!r} holds no sound checkpoint: start anew in another one.")


def _faults(folder: Path) -> list[str]:
    return find_faults(folder, folder.parent / CLIENTS_FOLDER)


def _check_kind(folder: Path) -> None:
    """Raises `ValueError` when a folder is no checkpoint of a federated run."""
    if has_federation(folder) or has_manifest(folder):
        return
    inside = numbered_checkpoints(folder)
    remedy = "To start from a model, load it with `from_pretrained` instead."
    if inside:
        remedy = f"It holds checkpoints: name one of them, {str(inside[-1])!r}."
    raise ValueError(
        f"`resume_from_checkpoint` names {folder.name}, which has no federation.json: it is not a checkpoint of a "
        f"federated run. {remedy}"
    )
