"""Configuration of a character LSTM. Flat: the file travels to the Hub as it is."""

from typing import Any

from transformers import PreTrainedConfig


# Beyond these a model is built, or its memory taken, for longer than anybody waits.
HIGHEST = {"vocab_size": 2**24, "embedding_size": 2**24, "hidden_size": 2**24, "num_hidden_layers": 1024}


class CharLSTMConfig(PreTrainedConfig):
    r"""
    Configuration of a [`CharLSTMForSequenceClassification`]: an embedding, LSTM layers and a linear head that reads
    the state after the last character.

    The defaults are the network that is usual on Shakespeare. With `num_labels=100`, where the class is the next
    character, it has 825,220 parameters.

    Args:
        vocab_size (`int`, *optional*, defaults to 100):
            Number of characters.
        embedding_size (`int`, *optional*, defaults to 8):
            Width of a character's embedding.
        hidden_size (`int`, *optional*, defaults to 256):
            Width of an LSTM layer.
        num_hidden_layers (`int`, *optional*, defaults to 2):
            Number of LSTM layers.
        pad_token_id (`int`, *optional*):
            What fills up short texts of a batch; which places it fills, the attention mask says. Defaults to the last
            character, the form feed of `string.printable`.
        num_labels (`int`, *optional*), id2label, label2id:
            As in every Hugging Face classifier.

    Raises:
        `ValueError`: If a value is out of its range.

    Example:

    ```python
    >>> CharLSTMConfig(num_labels=100).hidden_size
    256
    ```
    """

    model_type = "char_lstm"

    vocab_size: int = 100
    embedding_size: int = 8
    hidden_size: int = 256
    num_hidden_layers: int = 2
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_sizes()
        if self.pad_token_id is None:
            self.pad_token_id = self.vocab_size - 1
        super().__post_init__(**kwargs)
        self.validate()

    def validate(self) -> None:
        """
        Checks every field against its range.

        Raises:
            `ValueError`: Naming the field, its value and the remedy.
        """
        super().validate()  # type: ignore[misc]  # a decorator of `huggingface_hub` makes it
        self._check_sizes()
        pad = self.pad_token_id
        if isinstance(pad, bool) or not isinstance(pad, int) or not 0 <= pad < self.vocab_size:
            raise ValueError(
                f"`pad_token_id` is {pad!r}, but the characters are 0 to {self.vocab_size - 1} "
                "(`vocab_size`): pass one of them, or leave it out."
            )

    def _check_sizes(self) -> None:
        for field, highest in HIGHEST.items():
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`{field}` is {value!r}: pass an integer of at least 1.")
            if value > highest:
                raise ValueError(f"`{field}` is {value}: pass an integer of at most {highest}.")
