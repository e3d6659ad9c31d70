"""
Two extractors, a gate and one head, as the clients of pFedMoE train them. Flat: the file travels to the Hub as it is.

Shape suffixes: B batch, C classes, D inputs of the gate, H hidden, T tokens.
"""

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from .classification_head import classification_head
from .configuration_checks import AutoClassifier
from .configuration_paired_experts import PairedExpertsConfig


@dataclass
class PairedExpertsOutput(ModelOutput):
    """
    Output of a pair of experts.

    Args:
        loss (`torch.Tensor` of shape `(1,)`, *optional*, returned when `labels` is given):
            Cross-entropy.
        logits (`torch.Tensor` of shape `(B, C)`):
            Class scores.
        gate_probs (`torch.Tensor` of shape `(B, 2)`):
            Weights of the shared and of the own extractor.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    gate_probs: Tensor | None = None


class SwitchNorm(nn.Module):
    """
    Switchable normalisation (Luo et al. 2019) of vectors: means and variances are mixtures of those of each example
    (layer normalisation) and those of each feature (batch normalisation), with weights that learn.

    One example alone has no spread over a batch: for it, as in evaluation, the running statistics stand in.

    Args:
        size (`int`): Length D of the vectors.
        eps (`float`, *optional*, defaults to 1e-5): Added to variances.
        momentum (`float`, *optional*, defaults to 0.1): Share of a new batch in the running statistics.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, size: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        # Of layer and batch statistics, before softmax.
        self.mean_logits = nn.Parameter(torch.zeros(2))
        self.var_logits = nn.Parameter(torch.zeros(2))
        self.register_buffer("running_mean", torch.zeros(size))
        self.register_buffer("running_var", torch.ones(size))

    def forward(self, x_BD: Tensor) -> Tensor:
        """Normalises a batch, keeping its shape."""
        var_B1, mean_B1 = torch.var_mean(x_BD, dim=1, correction=0, keepdim=True)
        mean_D, var_D = self.running_mean, self.running_var
        if self.training and len(x_BD) > 1:
            var_D, mean_D = torch.var_mean(x_BD, dim=0, correction=0)
            with torch.no_grad():  # as in torch's batch normalisation, with n - 1
                self.running_mean.lerp_(mean_D.to(self.running_mean), self.momentum)
                self.running_var.lerp_((var_D * len(x_BD) / (len(x_BD) - 1)).to(self.running_var), self.momentum)
        mean_share, var_share = self.mean_logits.softmax(0), self.var_logits.softmax(0)
        mean_BD = mean_share[0] * mean_B1 + mean_share[1] * mean_D
        var_BD = var_share[0] * var_B1 + var_share[1] * var_D
        return (x_BD - mean_BD) * (var_BD + self.eps).rsqrt() * self.weight + self.bias


class LenientBatchNorm(nn.BatchNorm1d):
    """Batch normalisation that takes one example alone as in evaluation; torch refuses it in training."""

    def forward(self, x_BD: Tensor) -> Tensor:
        """Normalises a batch, keeping its shape."""
        if len(x_BD) > 1:
            return super().forward(x_BD)
        statistics = self.running_mean, self.running_var
        return nn.functional.batch_norm(x_BD, *statistics, self.weight, self.bias, eps=self.eps)


class PairedExpertsPreTrainedModel(PreTrainedModel):
    """
    Everything about the pair that does not depend on what it reads: logits = header(a_G G(x) + a_F F(x)) with
    [a_G, a_F] = gate(x). An extractor is a classifier without its last linear layer.

    `shared` is G, `own` is F, and `header` the last layer of F's classifier. Where the widths of the two differ,
    `projection` brings the features of G to that of F.
    """

    config: PairedExpertsConfig
    config_class = PairedExpertsConfig
    base_model_prefix = ""
    expert_auto_class: AutoClassifier = AutoModelForSequenceClassification
    # The extractors check for themselves which implementation they have.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    accepts_loss_kwargs = False

    def __init__(self, config: PairedExpertsConfig) -> None:
        super().__init__(config)
        self.shared, head = self._extractor("shared_config")
        self.own, self.header = self._extractor("own_config")
        same = head.in_features == self.header.in_features
        self.projection = nn.Identity() if same else nn.Linear(head.in_features, self.header.in_features)
        sizes = self._gate_input_size(), config.gate_hidden_size
        self.gate = nn.Sequential(
            SwitchNorm(sizes[0]),
            nn.Linear(*sizes),
            LenientBatchNorm(sizes[1]),
            nn.Sigmoid(),
            nn.Linear(sizes[1], 2),
            LenientBatchNorm(2),
            nn.Softmax(dim=-1),
        )
        self.supports_gradient_checkpointing = all(
            extractor.supports_gradient_checkpointing for extractor in (self.shared, self.own)
        )
        self.post_init()
        self.all_tied_weights_keys.update(self.get_expanded_tied_weights_keys(all_submodels=True))

    def _extractor(self, field: str) -> tuple[PreTrainedModel, nn.Linear]:
        """A classifier whose last linear layer is replaced by the identity, and that layer."""
        config = vars(self.config)[field]
        if type(config) not in self.expert_auto_class._model_mapping:
            raise ValueError(
                f"`{field}` is a {type(config).__name__}, which {self.expert_auto_class.__name__} does not know: pass "
                "the configuration of a classifier for this kind of input."
            )
        classifier = self.expert_auto_class.from_config(config)
        name = classification_head(classifier)
        if name is None:
            raise ValueError(
                f"`{field}` is that of {type(classifier).__name__}, which has no linear layer with `num_labels` = "
                f"{config.num_labels} outputs to read features from: take another classifier."
            )
        head = classifier.get_submodule(name)
        classifier.set_submodule(name, nn.Identity())
        return classifier, head

    def _gate_input_size(self) -> int:
        embeddings = self.shared.get_input_embeddings()
        assert isinstance(embeddings, nn.Embedding)
        return embeddings.embedding_dim

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SwitchNorm):
            for tensor in (module.weight, module.running_var):
                init.ones_(tensor)
            for tensor in (module.bias, module.mean_logits, module.var_logits, module.running_mean):
                init.zeros_(tensor)

    def get_input_embeddings(self) -> nn.Module:
        """Input embeddings of the shared extractor."""
        return self.shared.get_input_embeddings()

    def _classify(
        self, batch: dict[str, Tensor | None], gate_input_BD: Tensor, labels: Tensor | None
    ) -> PairedExpertsOutput:
        shared_BH, own_BH = (
            extractor(
                **{name: batch[name] for name in inspect.signature(extractor.forward).parameters if name in batch},
                return_dict=True,
            ).logits
            for extractor in (self.shared, self.own)
        )
        gate_probs_B2 = self.gate(gate_input_BD)
        features_BH = gate_probs_B2[:, :1] * self.projection(shared_BH) + gate_probs_B2[:, 1:] * own_BH
        logits_BC = self.header(features_BH)
        loss = None if labels is None else nn.functional.cross_entropy(logits_BC, labels)
        return PairedExpertsOutput(loss=loss, logits=logits_BC, gate_probs=gate_probs_B2)


class PairedExpertsForSequenceClassification(PairedExpertsPreTrainedModel):
    """
    A shared and an own extractor of texts. The gate reads the mean of the shared extractor's input embeddings over the
    tokens that are not masked; it does not train them.

    Args:
        config ([`PairedExpertsConfig`]):
            The configuration. Weights are random.
    """

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> PairedExpertsOutput:
        """
        Classifies a batch.

        Args:
            input_ids, attention_mask, token_type_ids (`torch.Tensor` of shape `(B, T)`, *optional*):
                As the extractors take them; what one does not take is not passed on.
            labels (`torch.Tensor` of shape `(B,)`, *optional*):
                Classes; asks for the loss.

        Returns:
            [`PairedExpertsOutput`]
        """
        if input_ids is None:
            raise ValueError("`input_ids` is missing from the inputs: pass it, the gate reads it too.")
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        mask_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        words_BTD = self.get_input_embeddings()(input_ids).detach()
        mask_BT1 = mask_BT[:, :, None].to(words_BTD)
        mean_BD = (words_BTD * mask_BT1).sum(1) / mask_BT1.sum(1).clamp_min(1)
        return self._classify({name: value for name, value in batch.items() if value is not None}, mean_BD, labels)


class PairedExpertsForImageClassification(PairedExpertsPreTrainedModel):
    """
    A shared and an own extractor of images. The gate reads the pixels.

    Args:
        config ([`PairedExpertsConfig`]):
            The configuration. Weights are random.
    """

    expert_auto_class = AutoModelForImageClassification
    main_input_name = "pixel_values"
    input_modalities = ["image"]

    def _gate_input_size(self) -> int:
        if self.config.gate_input_size is None:
            raise ValueError(
                "`gate_input_size` is None, and `shared_config` has no `image_size` to derive it from: pass "
                "num_channels * height * width of the images."
            )
        return self.config.gate_input_size

    @can_return_tuple
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> PairedExpertsOutput:
        """
        Classifies a batch.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, num_channels, height, width)`):
                Images.
            labels (`torch.Tensor` of shape `(B,)`, *optional*):
                Classes; asks for the loss.

        Returns:
            [`PairedExpertsOutput`]

        Raises:
            `ValueError`: If the gate was built for images of another size.
        """
        pixels_BD = pixel_values.flatten(1)
        if pixels_BD.shape[1] != self._gate_input_size():
            raise ValueError(
                f"`gate_input_size` is {self._gate_input_size()}, but `pixel_values` has the shape "
                f"{tuple(pixel_values.shape)}: build the model with gate_input_size={pixels_BD.shape[1]}."
            )
        return self._classify({"pixel_values": pixel_values}, pixels_BD, labels)
