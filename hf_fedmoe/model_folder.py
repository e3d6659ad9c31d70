"""Finds a saved model by what somebody calls it: its folder, that of its run, or its Hub id."""

from pathlib import Path


# Either is in the folder of a model: its own configuration, or that of adapters of one.
CONFIGURATIONS = ("config.json", "adapter_config.json")


def model_folder(model: str) -> Path:
    """
    Finds the folder of a saved model.

    Args:
        model (`str`): The folder, or that of the model's run.

    Raises:
        ValueError: When there is no model in either.
    """
    for folder in (Path(model), Path(model, "model")):
        if any((folder / name).is_file() for name in CONFIGURATIONS):
            return folder
    raise ValueError(f"{model!r} is no folder of a model, nor of a run of `hf-fedmoe train`: check the path.")


def model_place(model: str) -> str:
    """
    Finds what `from_pretrained` loads a model from.

    Args:
        model (`str`): Folder of the model or of its run, or a Hub id, which is returned as it is.

    Raises:
        ValueError: When there is such a path, and no model.
    """
    return str(model_folder(model)) if Path(model).exists() else model
