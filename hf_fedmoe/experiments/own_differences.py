"""Differences of clients who have their own files or folders."""

from typing import Any

from transformers import DataCollatorWithPadding, set_seed

from ..reporting import ClientDifferences, diagnose
from .own_data import parse_own


def diagnose_own(told: dict[str, Any], images: bool) -> ClientDifferences:
    """
    Tells in what clients differ, see [`~reporting.diagnose`].

    Args:
        told (`dict`): Settings by name, texts of a command line or values: those of [`OwnTexts`] or [`OwnImages`].
        images (`bool`): Whether `clients` are folders of images, not files of texts.

    Raises:
        ValueError: When something is wrong with the files or a setting.
    """
    experiment, args = parse_own({**told, "use_cpu": True}, images)
    processor = experiment.load_processor()
    data = experiment.make_ready(experiment.read(args.seed), processor, args.seed)
    set_seed(args.seed)
    model = experiment.make_expert(data, processor)
    collate = experiment.collators(processor).get("data_collator")
    return diagnose(data, model, collate or DataCollatorWithPadding(processor))
