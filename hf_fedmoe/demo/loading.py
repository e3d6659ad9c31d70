"""The model that a page shows, with what turns texts or images into its inputs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer
from transformers.image_utils import load_image
from transformers.utils import cached_file

from ..data.images import is_deep
from ..model_folder import model_place
from ..models import (
    FedMoECausalConfig,
    FedMoEConfig,
    FedMoEForCausalLM,
    FedMoEForImageClassification,
    FedMoEForSequenceClassification,
    FedMoEPreTrainedModel,
)
from ..reporting import ExpertFacts, read_expert_facts
from ..reporting.expert_facts import FILE


IMAGES = FedMoEForImageClassification.__name__


@dataclass(frozen=True)
class ShownClassifier:
    """
    A mixture of classifiers on show.

    Args:
        name (`str`): What the page calls it.
        model ([`~models.FedMoEPreTrainedModel`]): The mixture, in evaluation mode.
        processor (`Any`): Its tokenizer, or its image processor.
        facts ([`~reporting.ExpertFacts`], *optional*): Where its experts came from, if that was saved.
    """

    name: str
    model: FedMoEPreTrainedModel
    processor: Any
    facts: ExpertFacts | None

    @property
    def reads_images(self) -> bool:
        return isinstance(self.model, FedMoEForImageClassification)

    def inputs(self, content: str | None) -> dict[str, Tensor]:
        """
        Turns a text, or the path of an image, into the model's inputs.

        Raises:
            ValueError: When there is nothing to read, or the image has more than 8 bits a channel.
        """
        if not content or not content.strip():
            raise ValueError(f"There is nothing to read: give {'an image' if self.reads_images else 'a text'}.")
        if not self.reads_images:
            return dict(self.processor(content, truncation=True, return_tensors="pt"))
        with Image.open(content) as image:
            if is_deep(image):
                raise ValueError(f"The image has the mode {image.mode!r}, more than 8 bits a channel: convert it.")
        return dict(self.processor(load_image(content), return_tensors="pt"))


@dataclass(frozen=True)
class ShownOwners:
    """
    A mixture of owners of text on show.

    Args:
        name (`str`): What the page calls it.
        model ([`~models.FedMoEForCausalLM`]): The mixture, in evaluation mode.
        tokenizer (`Any`): Its tokenizer.
    """

    name: str
    model: FedMoEForCausalLM
    tokenizer: Any


def load_shown(model: str) -> ShownClassifier | ShownOwners:
    """
    Loads a mixture for a page.

    Args:
        model (`str`): Folder of the model or of its run, or a Hub id.

    Raises:
        ValueError: When there is none, or it is no mixture of which a page can show the experts.
    """
    place = model_place(model)
    name = Path(model).resolve().name if Path(model).is_dir() else model
    try:
        config = AutoConfig.from_pretrained(place)
    except (OSError, ValueError, KeyError, HFValidationError) as error:
        raise ValueError(f"{model!r} cannot be loaded: {_shortened(error)}") from error
    if isinstance(config, FedMoECausalConfig):
        owners = FedMoEForCausalLM.from_pretrained(place, config=config).eval()
        return ShownOwners(name, owners, AutoTokenizer.from_pretrained(place))
    if not isinstance(config, FedMoEConfig):
        raise ValueError(
            f"{model!r} is a model of the type {config.model_type!r}, no mixture of experts: `hf-fedmoe train "
            "--method fedmoe` makes one, and `hf-fedmoe predict` asks models of any kind."
        )
    images = IMAGES in (config.architectures or ())
    kind = FedMoEForImageClassification if images else FedMoEForSequenceClassification
    try:
        mixture, processor = kind.from_pretrained(place).eval(), _processor(place, images)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{model!r} cannot be shown: {_shortened(error)}") from error
    return ShownClassifier(name, mixture, processor, _facts(place, config))


def _processor(place: str, images: bool) -> Any:
    return AutoImageProcessor.from_pretrained(place) if images else AutoTokenizer.from_pretrained(place)


def _facts(place: str, config: FedMoEConfig) -> ExpertFacts | None:
    file = cached_file(
        place, FILE, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    if file is None:
        return None
    return read_expert_facts(file, config.num_main_experts + config.num_routed_experts, config.num_routed_experts)


def _shortened(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
