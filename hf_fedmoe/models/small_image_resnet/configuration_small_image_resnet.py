"""Configuration of a ResNet for small images. Flat: the file travels to the Hub as it is."""

from typing import Any

from transformers import ResNetConfig
from transformers.activations import ACT2FN


# No layer is wider, no stage deeper: each layer is built before any weight is read.
MAX_WIDTH, MAX_DEPTH = 2**24, 1024
LAYER_TYPES = ("basic", "bottleneck")


class SmallImageResNetConfig(ResNetConfig):
    r"""
    Configuration of a [`SmallImageResNetForImageClassification`]. The defaults are ResNet-18 for images of 32 pixels:
    11,173,962 parameters with `num_labels=10`.

    Args:
        num_channels (`int`, *optional*, defaults to 3):
            Colour channels of the images.
        embedding_size (`int`, *optional*, defaults to 64):
            Filters of the 3x3 stem.
        hidden_sizes (`list[int]`, *optional*, defaults to `(64, 128, 256, 512)`):
            Filters of each stage; every stage but the first halves the image.
        depths (`list[int]`, *optional*, defaults to `(2, 2, 2, 2)`):
            Layers of each stage.
        layer_type (`str`, *optional*, defaults to `"basic"`):
            `"basic"` or `"bottleneck"`, the layer of ResNet-50 and deeper.
        hidden_act, downsample_in_first_stage, downsample_in_bottleneck:
            As in `ResNetConfig`.

    Raises:
        `ValueError`: If a value is out of its range.

    Example:

    ```python
    >>> SmallImageResNetConfig(num_labels=10).depths
    (2, 2, 2, 2)
    ```
    """

    model_type = "small_image_resnet"

    hidden_sizes: list[int] | tuple[int, ...] | None = (64, 128, 256, 512)
    depths: list[int] | tuple[int, ...] | None = (2, 2, 2, 2)
    layer_type: str = "basic"

    def __post_init__(self, **kwargs: Any) -> None:
        for field in ("num_channels", "embedding_size"):
            if not _is_integer(getattr(self, field), MAX_WIDTH):
                raise ValueError(f"`{field}` is {getattr(self, field)!r}: pass an integer from 1 to {MAX_WIDTH}.")
        counts = []
        for field, highest in (("hidden_sizes", MAX_WIDTH), ("depths", MAX_DEPTH)):
            values = getattr(self, field)
            if not isinstance(values, (list, tuple)) or not values or not all(_is_integer(v, highest) for v in values):
                raise ValueError(f"`{field}` is {values!r}: pass integers from 1 to {highest}, one for each stage.")
            counts.append(len(values))
        if counts[0] != counts[1]:
            raise ValueError(
                f"`depths` is {self.depths!r} and `hidden_sizes` {self.hidden_sizes!r}: pass one of each for a stage."
            )
        for field, allowed in (("layer_type", LAYER_TYPES), ("hidden_act", tuple(ACT2FN))):
            value = getattr(self, field)
            if not isinstance(value, str) or value not in allowed:
                raise ValueError(f"`{field}` is {value!r}: pass one of {', '.join(map(repr, allowed))}.")
        super().__post_init__(**kwargs)


def _is_integer(value: Any, highest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= highest
