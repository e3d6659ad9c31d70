"""Configuration of an ensemble of classifiers. Flat: the file travels to the Hub as it is."""

import copy
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


# Each is a model, or a head, that is built before any weight is read.
MAX_MODELS = 1024
# Models that consist of classifiers, which an ensemble does not consist of.
COMPOSITE_TYPES = ("adapted_classifier", "classifier_ensemble", "fedmoe", "multi_head_classifier", "paired_experts")


class EnsembleConfig(PreTrainedConfig):
    r"""
    Configuration of an [`EnsembleForSequenceClassification`] or [`EnsembleForImageClassification`]: `num_models`
    classifiers of one architecture. The padding token is theirs, and so are names of classes unless `id2label` is
    given. An architecture that transformers does not know has to be registered before such a checkpoint is loaded.

    Args:
        expert_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of each classifier; a `dict` needs a `model_type`. Defaults to a `BertConfig`.
        num_models (`int`, *optional*, defaults to 3):
            Number M of classifiers, at most 1024.

    Raises:
        `ValueError`: If a value is out of its range, or the classifiers are models of models.

    Example:

    ```python
    >>> from transformers import GPT2Config
    >>> EnsembleConfig(expert_config=GPT2Config(n_layer=2, num_labels=4)).num_labels
    4
    ```
    """

    model_type = "classifier_ensemble"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["model_logits"]
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "expert_config": SubConfigSpec(config_class=AutoConfig, model_type="bert"),
    }

    # What the number of models is called in messages.
    count_name: ClassVar[str] = "num_models"

    expert_config: dict | PreTrainedConfig | None = None
    num_models: int = 3
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_expert_config()
        self.expert_config = copy.deepcopy(self.expert_config)
        names = self.id2label
        super().__post_init__(**kwargs)
        if isinstance(self.num_models, bool) or not isinstance(self.num_models, int) or self.num_models < 1:
            raise ValueError(f"`{self.count_name}` is {self.num_models!r}: pass an integer of at least 1.")
        if self.num_models > MAX_MODELS:
            raise ValueError(f"`{self.count_name}` is {self.num_models}: pass an integer of at most {MAX_MODELS}.")
        expert = self.expert_config
        assert isinstance(expert, PreTrainedConfig)  # made of a `dict` by now
        given = expert.id2label if names is None else self.id2label
        self.id2label = {int(label): name for label, name in (given or {}).items()}
        self.label2id = {name: label for label, name in self.id2label.items()}
        expert.id2label, expert.label2id = dict(self.id2label), dict(self.label2id)
        # Of texts only.
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(self, name, getattr(expert.get_text_config(), name, None))

    def _check_expert_config(self) -> None:
        # Before a `dict` becomes a configuration, which nested ones would do to any depth.
        config = self.expert_config
        if config is not None and not isinstance(config, (dict, PreTrainedConfig)):
            raise ValueError(f"`expert_config` is {config!r}: pass the configuration of a classifier.")
        model_type = config.get("model_type") if isinstance(config, dict) else getattr(config, "model_type", None)
        if model_type in COMPOSITE_TYPES:
            raise ValueError(
                f"`expert_config` is that of a {model_type!r}, which consists of classifiers itself: pass the "
                "configuration of a single classifier."
            )
