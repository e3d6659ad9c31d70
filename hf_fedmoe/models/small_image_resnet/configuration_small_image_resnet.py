"""Configuration of a ResNet for small images. Flat: the file travels to the Hub as it is."""

from transformers import ResNetConfig


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
