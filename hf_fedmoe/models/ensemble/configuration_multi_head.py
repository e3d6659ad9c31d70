"""Configuration of a classifier with several heads. Flat: the file travels to the Hub as it is."""

from typing import ClassVar

from .configuration_ensemble import EnsembleConfig


class MultiHeadConfig(EnsembleConfig):
    r"""
    Configuration of a [`MultiHeadForSequenceClassification`] or [`MultiHeadForImageClassification`]: one backbone and
    `num_heads` heads. Labels and padding token are those of the classifier.

    Args:
        expert_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the classifier with one head; a `dict` needs a `model_type`. Defaults to a `BertConfig`.
        num_models (`int`, *optional*, defaults to 3):
            Number M of heads; `num_heads` is another name of it.

    Example:

    ```python
    >>> from transformers import GPT2Config
    >>> MultiHeadConfig(expert_config=GPT2Config(n_layer=2), num_heads=4).num_models
    4
    ```
    """

    model_type = "multi_head_classifier"
    attribute_map: ClassVar[dict[str, str]] = {"num_heads": "num_models"}
    count_name: ClassVar[str] = "num_heads"
