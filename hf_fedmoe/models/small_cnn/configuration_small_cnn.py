"""Configuration of a small convolutional network. Flat: the file travels to the Hub as it is."""

from typing import Any

from transformers import PreTrainedConfig


# No layer is wider, no kernel larger.
MAX_WIDTH = 2**24


class SmallCNNConfig(PreTrainedConfig):
    r"""
    Configuration of a [`SmallCNNForImageClassification`]: blocks of convolution, ReLU and 2x2 max-pooling, then
    fully connected layers with ReLU, then a linear head.

    The defaults, but for the number of classes, are the CNN that is usual on FEMNIST.

    | network | arguments that differ |
    |---|---|
    | FEMNIST of Fed-MoE, 6,603,710 parameters | `num_labels=62` |
    | EMNIST of pFedMM, 2,278,334 | `num_labels=62, padding=0` |
    | CIFAR-10 of pFedMoE, client CNN 1, 2,621,558 | as below, `channels=(16, 32), hidden_size=(2000, 500)` |
    | client CNN 2, 1,815,142 | as below, `channels=(16, 16), hidden_size=(2000, 500)` |
    | client CNN 3, 4, 5 | as below, `channels=(16, 32)`, `hidden_size=(1000, 500)`, `(800, 500)`, `(500, 500)` |

    All five client CNNs have `num_labels=10, num_channels=3, image_size=32, padding=0`.

    Args:
        image_size (`int`, *optional*, defaults to 28):
            Height and width of the images.
        num_channels (`int`, *optional*, defaults to 1):
            Colour channels of the images.
        channels (`tuple[int]`, *optional*, defaults to `(32, 64)`):
            Filters of each convolution.
        kernel_size (`int`, *optional*, defaults to 5):
            Height and width of the filters.
        padding (`int`, *optional*, defaults to 2):
            Zeros around the input of each convolution; with 2 a 5x5 convolution keeps the size.
        hidden_size (`int` or `tuple[int]`, *optional*, defaults to 2048):
            Width of the fully connected layer, or of each of several. The head reads the last one.
        num_labels (`int`, *optional*), id2label, label2id:
            As in every Hugging Face classifier.

    Raises:
        `ValueError`: If a value is out of its range or nothing is left of the image before the last pooling.

    Example:

    ```python
    >>> SmallCNNConfig(num_labels=62).flat_size
    3136
    ```
    """

    model_type = "small_cnn"

    image_size: int = 28
    num_channels: int = 1
    channels: tuple[int, ...] | list[int] = (32, 64)
    kernel_size: int = 5
    padding: int = 2
    hidden_size: int | tuple[int, ...] | list[int] = 2048

    def __post_init__(self, **kwargs: Any) -> None:
        # JSON knows lists only; experts are compared by their configurations.
        for field in ("channels", "hidden_size"):
            if isinstance(getattr(self, field), list):
                setattr(self, field, tuple(getattr(self, field)))
        super().__post_init__(**kwargs)
        self.validate()

    @property
    def hidden_sizes(self) -> tuple[int, ...]:
        """Widths of the fully connected layers, in order."""
        return tuple(self.hidden_size) if isinstance(self.hidden_size, (list, tuple)) else (self.hidden_size,)

    @property
    def feature_size(self) -> int:
        """Height and width of the feature map after the last pooling."""
        size = self.image_size
        for _ in self.channels:
            size = (size + 2 * self.padding - self.kernel_size + 1) // 2
        return size

    @property
    def flat_size(self) -> int:
        """Number of features that the first fully connected layer reads."""
        return self.channels[-1] * self.feature_size**2

    def validate(self) -> None:
        """
        Checks every field against its range.

        Raises:
            `ValueError`: Naming the field, its value and the remedy.
        """
        super().validate()  # type: ignore[misc]  # a decorator of `huggingface_hub` makes it
        for field, low in (("image_size", 1), ("num_channels", 1), ("kernel_size", 1), ("padding", 0)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"`{field}` is {value!r}: pass an integer of at least {low}.")
            if value > MAX_WIDTH:
                raise ValueError(f"`{field}` is {value}: pass an integer of at most {MAX_WIDTH}.")
        for field, values in (("channels", self.channels), ("hidden_size", self.hidden_sizes)):
            if not isinstance(values, tuple) or not values or not all(map(_is_width, values)):
                raise ValueError(
                    f"`{field}` is {getattr(self, field)!r}: pass positive integers, one for each layer, of at most "
                    f"{MAX_WIDTH}."
                )
        if self.feature_size < 1:
            raise ValueError(
                f"`image_size` is {self.image_size}, of which {len(self.channels)} convolutions with `kernel_size` = "
                f"{self.kernel_size} and `padding` = {self.padding}, each halved by pooling, leave nothing: pass "
                "larger images, a smaller kernel or more padding."
            )


def _is_width(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_WIDTH
