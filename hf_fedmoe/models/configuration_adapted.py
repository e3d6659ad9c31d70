"""Configuration of a classifier that is a named base and an adapter. Flat: the file travels to the Hub as it is."""

import copy
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_checks import built, check_classifier_config, check_labels, class_names


# Facts about where a configuration came from, and what a training step writes.
_FACTS = frozenset(
    ("_name_or_path", "architectures", "auto_map", "dtype", "problem_type", "transformers_version", "use_cache")
)


class AdaptedConfig(PreTrainedConfig):
    r"""
    Holds what an `adapter_config.json` lacks of its classifier: the configuration of the base with the labels, their
    names and the padding token that the adapter was trained with. It lies beside that file as `config.json`.

    Args:
        base_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the base; a `dict` needs a `model_type`. Defaults to a `BertConfig`.
        num_labels (`int`, *optional*), id2label, label2id:
            As in every Hugging Face classifier. Default to those of `base_config`.

    Example:

    ```python
    >>> from transformers import BertConfig
    >>> AdaptedConfig(base_config=BertConfig(num_labels=4)).num_labels
    4
    ```
    """

    model_type = "adapted_classifier"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "base_config": SubConfigSpec(config_class=AutoConfig, model_type="bert"),
    }

    base_config: dict | PreTrainedConfig | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        check_labels(kwargs.get("num_labels"), self.id2label, self.label2id)
        check_classifier_config("base_config", self.base_config)
        self.base_config = copy.deepcopy(self.base_config)
        given = self.id2label is not None or kwargs.get("num_labels") is not None
        super().__post_init__(**kwargs)
        if not given:
            self.id2label, self.label2id = class_names(built(self.base_config)), built(self.base_config).label2id
        if self.label2id is None:
            self.label2id = {label: index for index, label in class_names(self).items()}
        self.pad_token_id = getattr(built(self.base_config).get_text_config(), "pad_token_id", None)


def says_the_same(config: PreTrainedConfig, other: PreTrainedConfig) -> bool:
    """Tells whether two configurations differ in nothing but facts about where they came from."""
    first, second = config.to_dict(), other.to_dict()
    return all(first.get(key) == second.get(key) for key in (first.keys() | second.keys()) - _FACTS)
