"""Configuration of a pair of experts under one head. Flat: the file travels to the Hub as it is."""

import copy
import math
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_checks import built, check_classifier_config, check_integer, class_names


class PairedExpertsConfig(PreTrainedConfig):
    r"""
    Configuration of a [`PairedExpertsForSequenceClassification`] or [`PairedExpertsForImageClassification`]: the
    extractors of two classifiers, a gate that mixes their features, and the head of the second. The two may be of
    different architectures. One that transformers does not know has to be registered before such a checkpoint is
    loaded.

    Args:
        shared_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the classifier whose extractor all clients share; a `dict` needs a `model_type`. Defaults
            to a `BertConfig`.
        own_config (`dict` or `PreTrainedConfig`, *optional*):
            That of the client's own classifier. It takes over the names of the classes and, of texts, a `pad_token_id`
            that it lacks. Defaults to a `BertConfig`.
        gate_hidden_size (`int`, *optional*, defaults to 64):
            Width of the gate's hidden layer.
        gate_input_size (`int`, *optional*):
            Width of what the gate reads. Of images channels * height * width, by default as `shared_config` names them
            if it has an `image_size`; of texts always the width of the shared extractor's embeddings.

    Raises:
        `ValueError`: If the two classifiers do not go together.

    Example:

    ```python
    >>> from transformers import BertConfig, GPT2Config
    >>> PairedExpertsConfig(shared_config=BertConfig(num_labels=4), own_config=GPT2Config(num_labels=4)).num_labels
    4
    ```
    """

    model_type = "paired_experts"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["gate_probs"]
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "shared_config": SubConfigSpec(config_class=AutoConfig, model_type="bert"),
        "own_config": SubConfigSpec(config_class=AutoConfig, model_type="bert"),
    }

    shared_config: dict | PreTrainedConfig | None = None
    own_config: dict | PreTrainedConfig | None = None
    gate_hidden_size: int = 64
    gate_input_size: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for field in ("shared_config", "own_config"):
            check_classifier_config(field, vars(self)[field])
        self.shared_config, self.own_config = copy.deepcopy(self.shared_config), copy.deepcopy(self.own_config)
        names = self.id2label
        super().__post_init__(**kwargs)
        configs = built(self.shared_config), built(self.own_config)
        # Not every configuration has every field.
        shared, own = (vars(config.get_text_config()) for config in configs)
        if names is None:
            self.id2label = class_names(configs[0])
        self.pad_token_id = shared.get("pad_token_id")
        if self.pad_token_id is not None and own.get("pad_token_id") is None:
            configs[1].get_text_config().pad_token_id = self.pad_token_id
        if self.gate_input_size is None and shared.get("image_size") is not None:
            size = shared["image_size"]
            self.gate_input_size = shared["num_channels"] * (size**2 if isinstance(size, int) else math.prod(size))
        check_integer("gate_hidden_size", self.gate_hidden_size)
        if self.gate_input_size is not None:
            check_integer("gate_input_size", self.gate_input_size)
        self._check_pair(shared, own)
        self.label2id = {name: label for label, name in class_names(self).items()}
        for config in configs:
            config.id2label, config.label2id = class_names(self), dict(self.label2id)

    def _check_pair(self, shared: dict[str, Any], own: dict[str, Any]) -> None:
        """Both read the same inputs and know the same classes."""
        own_labels, shared_labels = built(self.own_config).num_labels, built(self.shared_config).num_labels
        if own_labels != shared_labels:
            raise ValueError(
                f"`own_config` has {own_labels} labels (`num_labels`), `shared_config` {shared_labels}: make them "
                "equal."
            )
        for field in ("num_channels", "pad_token_id"):
            mine, theirs = own.get(field), shared.get(field)
            if mine is not None and theirs is not None and mine != theirs:
                raise ValueError(
                    f"`{field}` is {mine!r} in `own_config` and {theirs!r} in `shared_config`, but both read the same "
                    "inputs: make them equal."
                )
        if own.get("vocab_size", math.inf) < shared.get("vocab_size", 0):
            raise ValueError(
                f"`vocab_size` is {own['vocab_size']} in `own_config`, less than the {shared['vocab_size']} of "
                "`shared_config`, but both read the same tokens: make it as large."
            )
