"""
Character LSTMs as Hugging Face models. Flat: the file travels to the Hub as it is.

Shape suffixes: B batch, T characters, E embedding, H hidden, C classes.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndNoAttention,
    SequenceClassifierOutput,
)
from transformers.utils import can_return_tuple

from .configuration_char_lstm import CharLSTMConfig


class CharLSTMPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config: CharLSTMConfig
    config_class = CharLSTMConfig
    base_model_prefix = "char_lstm"
    main_input_name = "input_ids"
    _no_split_modules = []
    _input_embed_layer = "embedding"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # As torch does by itself, and so the papers: a normal distribution of 0.02 starts these networks too small.
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        elif isinstance(module, nn.LSTM | nn.Linear):
            width = module.hidden_size if isinstance(module, nn.LSTM) else module.in_features
            for parameter in module.parameters():
                init.uniform_(parameter, -(width**-0.5), width**-0.5)


class CharLSTMModel(CharLSTMPreTrainedModel):
    """
    Embedding and LSTM layers without a head: the shared part of methods with personal heads.

    Args:
        config ([`CharLSTMConfig`]):
            The configuration. Weights are random.
    """

    def __init__(self, config: CharLSTMConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_size)
        self.lstm = nn.LSTM(config.embedding_size, config.hidden_size, config.num_hidden_layers, batch_first=True)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> BaseModelOutputWithPoolingAndNoAttention:
        """
        Reads a batch of texts.

        Args:
            input_ids (`torch.Tensor` of shape `(B, T)`):
                Numbers of characters.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*):
                0 where there is padding, which is read nowhere: left, right or between. Without it all is text.

        Returns:
            `BaseModelOutputWithPoolingAndNoAttention`: `last_hidden_state` of shape `(B, T, H)`, the states after each
            character of the text, with padding moved behind it, and `pooler_output` of shape `(B, H)`, the state after
            the last character (zeros for a text without any).

        Raises:
            `ValueError`: If inputs and mask are not of one shape `(B, T)`.
        """
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ValueError(
                f"`input_ids` has the shape {tuple(input_ids.shape)}: pass (batch, characters), with at least one "
                "character."
            )
        if attention_mask is None:
            states_BTH, _ = self.lstm(self.embedding(input_ids))
            return BaseModelOutputWithPoolingAndNoAttention(states_BTH, states_BTH[:, -1])
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"`attention_mask` has the shape {tuple(attention_mask.shape)}, `input_ids` "
                f"{tuple(input_ids.shape)}: pass one number for each character, or no mask."
            )
        # Characters first, in their order: what an LSTM reads after the last of them cannot change its state there.
        is_text_BT = attention_mask != 0
        order_BT = is_text_BT.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
        states_BTH, _ = self.lstm(self.embedding(input_ids.gather(1, order_BT)))
        lengths_B = is_text_BT.sum(1)
        last_BH = states_BTH[torch.arange(len(lengths_B), device=lengths_B.device), (lengths_B - 1).clamp(min=0)]
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=states_BTH, pooler_output=last_BH * (lengths_B > 0)[:, None]
        )


class CharLSTMForSequenceClassification(CharLSTMPreTrainedModel):
    """
    A [`CharLSTMModel`] with a linear head; on Shakespeare the class is the next character.

    Args:
        config ([`CharLSTMConfig`]):
            The configuration. Weights are random.
    """

    def __init__(self, config: CharLSTMConfig) -> None:
        super().__init__(config)
        self.char_lstm = CharLSTMModel(config)
        assert config.num_labels is not None
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """
        Classifies a batch of texts.

        Args:
            input_ids (`torch.Tensor` of shape `(B, T)`):
                Numbers of characters.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*):
                0 where there is padding, anywhere. Without it all is text.
            labels (`torch.Tensor` of shape `(B,)`, *optional*):
                Classes; asks for the loss.

        Returns:
            `SequenceClassifierOutput`: `loss` and `logits` of shape `(B, C)`.
        """
        logits_BC = self.classifier(self.char_lstm(input_ids, attention_mask).pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits_BC, self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits_BC)
