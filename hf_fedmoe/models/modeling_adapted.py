"""
Classifiers that are a named base and a PEFT adapter, loaded with the labels that the adapter was trained with. Flat:
the file travels to the Hub as it is.
"""

import copy
import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import CONFIG_NAME

from .adapters_fedmoe import base_arguments, ids_of_adapters, load_base, source_arguments
from .configuration_adapted import AdaptedConfig, says_the_same
from .configuration_checks import AutoClassifier, built, class_names


# Where the base is if it has no name to be loaded by.
BASE_FOLDER = "base"


class AdaptedForSequenceClassification(PreTrainedModel):
    """
    Loads a text classifier that is an adapter and its base. Nothing is an instance of this class: like `transformers`
    with any folder of an adapter, [`~AdaptedForSequenceClassification.from_pretrained`] returns the base with the
    adapter in it.
    """

    config_class = AdaptedConfig
    base_auto_class: AutoClassifier = AutoModelForSequenceClassification

    def __init__(self, config: AdaptedConfig) -> None:
        raise TypeError(f"A {type(self).__name__} is never built: load one, `from_pretrained`, or adapt its base.")

    @classmethod
    def from_pretrained(  # type: ignore[override]  # what it returns is the base
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *model_args: Any,
        config: AdaptedConfig | None = None,
        adapter_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> PreTrainedModel:
        """
        Loads as `PreTrainedModel` does; the arguments that concern a model's weights (`dtype`, `device_map`,
        `quantization_config`, ...) are those of the base.

        Raises:
            `ValueError`: If the folder holds neither the base nor its name.
        """
        # Given the name of an adapter on the Hub, `transformers` comes with that of its base.
        place = str((adapter_kwargs or {}).get("_adapter_model_path") or pretrained_model_name_or_path)
        source = source_arguments(kwargs)
        if config is None:
            config, kwargs = cls.config_class.from_pretrained(place, return_unused_kwargs=True, **kwargs)
        for_base = base_arguments(kwargs, source)
        peft_config = PeftConfig.from_pretrained(place, **source)
        name, revision = peft_config.base_model_name_or_path, peft_config.revision
        if not name:
            name = os.path.join(place, source.get("subfolder", ""), BASE_FOLDER)
            if not os.path.isdir(name):
                raise ValueError(
                    f"The adapter {place!r} does not name its base, which is expected in its folder {BASE_FOLDER!r}: "
                    "download the repository, `huggingface_hub.snapshot_download(...)`, and load it from there."
                )
        base_config = copy.deepcopy(built(config.base_config))
        base_config.id2label = class_names(config)
        base_config.label2id = {label: int(index) for label, index in (config.label2id or {}).items()}
        base = load_base(cls.base_auto_class, name, base_config, revision=revision, **for_base)
        base.load_adapter(place, use_safetensors=True, adapter_kwargs=source)
        return base.eval()


class AdaptedForImageClassification(AdaptedForSequenceClassification):
    """Loads an image classifier that is an adapter and its base, see [`AdaptedForSequenceClassification`]."""

    base_auto_class = AutoModelForImageClassification
    main_input_name = "pixel_values"
    input_modalities = ["image"]


class AdaptedClassifier(PeftModel):
    """A `PeftModel` that is saved with what else loading it needs: see [`save_base_configs`]."""

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Saves as `PeftModel` does, and the configurations of the base."""
        super().save_pretrained(str(save_directory), *args, **kwargs)
        save_base_configs(self, save_directory)


def save_base_configs(
    model: PeftModel,
    save_directory: str | os.PathLike,
    names: list[str] | None = None,
    config: PreTrainedConfig | None = None,
) -> None:
    """
    Writes a `config.json` beside each saved adapter, which would otherwise be loaded with the number of labels, their
    names and the padding token of the base as its name is found. Where the base says the same there is no need, and no
    file. A base without a name is saved into the folder `base` there.

    Args:
        model (`PeftModel`): What was saved.
        save_directory (`str` or `os.PathLike`): Where it was saved.
        names (`list[str]`, *optional*): Of the adapters that were saved, all if left out.
        config (`PreTrainedConfig`, *optional*): Of the base with the adapters' labels, its own if left out.
    """
    base = model.get_base_model()
    assert isinstance(base, PreTrainedModel)
    base_config = base.config if config is None else config
    reads_images = base.main_input_name == "pixel_values"
    kind = AdaptedForImageClassification if reads_images else AdaptedForSequenceClassification
    for name in names or model.peft_config:
        # As PEFT places them.
        folder, peft_config = Path(save_directory, "" if name == "default" else name), model.peft_config[name]
        if not peft_config.base_model_name_or_path:
            save_base(model, folder / BASE_FOLDER)
        elif _says_the_same(base_config, peft_config.base_model_name_or_path, peft_config.revision):
            Path(folder, CONFIG_NAME).unlink(missing_ok=True)  # of an earlier model in this folder
            continue
        config = AdaptedConfig(base_config=base_config, architectures=[kind.__name__])
        if kind.is_remote_code():
            # Asks an object for its class, module and Auto class only.
            custom_object_save(kind.__new__(kind), folder, config=config)  # type: ignore[arg-type]  # declared a dict
        config.save_pretrained(folder)


def save_base(model: PeftModel, folder: str | os.PathLike) -> None:
    """Saves the base under an adapter as it was before, with a head that is of no use."""
    base, own = model.get_base_model(), ids_of_adapters(model, list(model.peft_config))
    assert isinstance(base, PreTrainedModel)
    state = {
        name.replace("base_layer.", "").replace("original_module.", ""): tensor
        for name, tensor in base.state_dict(keep_vars=True).items()
        if id(tensor) not in own
    }
    with torch.device("meta"):
        clean = type(base)(base.config)
    clean.load_state_dict(state, assign=True)
    clean.save_pretrained(folder)


def _says_the_same(config: PreTrainedConfig, name: str, revision: str | None) -> bool:
    try:
        # What a base was loaded from is here; nobody waits for the Hub to save a model.
        named = AutoConfig.from_pretrained(name, revision=revision, local_files_only=True)
    except (OSError, ValueError):
        return False
    return says_the_same(named, config)
