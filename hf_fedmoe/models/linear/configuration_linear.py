"""Configuration of a linear classifier. Flat: the file travels to the Hub as it is."""

from typing import Any

from transformers import PreTrainedConfig


# No layer is wider.
MAX_WIDTH = 2**24


class LinearConfig(PreTrainedConfig):
    r"""
    Configuration of a [`LinearForClassification`]; the defaults fit the synthetic mixture of FedEM and pFedMM.

    Args:
        num_features (`int`, *optional*, defaults to 150):
            Length of the vector that is classified.
        num_labels (`int`, *optional*, defaults to 2), id2label, label2id:
            As in every Hugging Face classifier.

    Raises:
        `ValueError`: If a value is out of its range.

    Example:

    ```python
    >>> LinearConfig(num_features=20).num_labels
    2
    ```
    """

    model_type = "linear_classifier"

    num_features: int = 150

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.validate()

    def validate(self) -> None:
        """
        Checks every field against its range.

        Raises:
            `ValueError`: Naming the field, its value and the remedy.
        """
        super().validate()  # type: ignore[misc]  # a decorator of `huggingface_hub` makes it
        value = self.num_features
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`num_features` is {value!r}: pass an integer of at least 1.")
        if value > MAX_WIDTH:
            raise ValueError(f"`num_features` is {value}: pass an integer of at most {MAX_WIDTH}.")
        if (self.num_labels or 0) < 2:
            raise ValueError(f"`num_labels` is {self.num_labels}: pass at least 2 classes.")
