"""
A linear classifier as a Hugging Face model. Flat: the file travels to the Hub as it is.

Shape suffixes: B batch, D features, C classes.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import can_return_tuple

from .configuration_linear import LinearConfig


class LinearForClassification(PreTrainedModel):
    """
    Logistic regression: one linear function for each class but the first, whose logit is 0.

    With two classes that is one function, and the cross-entropy is the binary cross-entropy of its sigmoid.

    Args:
        config ([`LinearConfig`]):
            The configuration. Weights are random.
    """

    config: LinearConfig
    config_class = LinearConfig
    main_input_name = "features"
    _no_split_modules = []

    def __init__(self, config: LinearConfig) -> None:
        super().__init__(config)
        assert config.num_labels is not None
        self.linear = nn.Linear(config.num_features, config.num_labels - 1)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # As torch does by itself, and so the papers.
        if isinstance(module, nn.Linear):
            for parameter in module.parameters():
                init.uniform_(parameter, -(module.in_features**-0.5), module.in_features**-0.5)

    @can_return_tuple
    def forward(self, features: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        """
        Classifies a batch of vectors.

        Args:
            features (`torch.Tensor` of shape `(B, D)`):
                The vectors.
            labels (`torch.Tensor` of shape `(B,)`, *optional*):
                Classes; asks for the loss.

        Returns:
            `SequenceClassifierOutput`: `loss` and `logits` of shape `(B, C)`.

        Raises:
            `ValueError`: If the vectors have another length.
        """
        if features.dim() != 2 or features.shape[1] != self.config.num_features:
            raise ValueError(
                f"`features` has the shape {tuple(features.shape)}, but `num_features` is "
                f"{self.config.num_features}: pass (batch, {self.config.num_features}), or build the model with the "
                "length of your vectors."
            )
        logits_BC = nn.functional.pad(self.linear(features), (1, 0))
        loss = None if labels is None else nn.functional.cross_entropy(logits_BC, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits_BC)
