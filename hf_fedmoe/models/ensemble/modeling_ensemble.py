"""
Several classifiers and one weight for each. Flat: the file travels to the Hub as it is.

Shape suffixes: B batch, C classes, M models.
"""

import inspect
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_ensemble import EnsembleConfig


@dataclass
class EnsembleOutput(ModelOutput):
    """
    Output of the ensemble.

    Args:
        loss (`torch.Tensor` of shape `(1,)`, *optional*, returned when `labels` is given):
            Cross-entropy of the mixture.
        logits (`torch.Tensor` of shape `(B, C)`):
            Logarithm of the mixture, so that `softmax(logits)` is the mixture.
        model_logits (`torch.Tensor` of shape `(B, M, C)`):
            Every classifier's own logits.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    model_logits: Tensor | None = None


def mix_models(logits_BMC: Tensor, weights_M: Tensor) -> Tensor:
    """log sum_m w_m softmax(logits_m), of shape `(B, C)`, in float32 at least."""
    logits_BMC = logits_BMC.to(torch.promote_types(logits_BMC.dtype, torch.float32))
    log_weights_M1 = weights_M.to(logits_BMC.dtype).clamp_min(torch.finfo(logits_BMC.dtype).tiny).log()[:, None]
    return (log_weights_M1 + logits_BMC.log_softmax(-1)).logsumexp(1)


class EnsemblePreTrainedModel(PreTrainedModel):
    """Everything about the ensemble that does not depend on what its classifiers read."""

    config: EnsembleConfig
    config_class: type[EnsembleConfig] = EnsembleConfig
    base_model_prefix = ""
    expert_auto_class: type[AutoModelForImageClassification] | type[AutoModelForSequenceClassification] = (
        AutoModelForSequenceClassification
    )
    mixture_M: Tensor
    # The classifiers check for themselves which implementation they have.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    accepts_loss_kwargs = False

    def __init__(self, config: EnsembleConfig) -> None:
        super().__init__(config)
        self.models = self._make_models(config)
        self.register_buffer("mixture_M", torch.full((config.num_models,), 1 / config.num_models))
        self.supports_gradient_checkpointing = self._first.supports_gradient_checkpointing
        self._names = frozenset(inspect.signature(self._first.forward).parameters)
        self.post_init()
        self.all_tied_weights_keys.update(self.get_expanded_tied_weights_keys(all_submodels=True))

    @property
    def _first(self) -> PreTrainedModel:
        first = self.models[0]
        assert isinstance(first, PreTrainedModel)
        return first

    def _make_models(self, config: EnsembleConfig) -> nn.ModuleList:
        make = self.expert_auto_class.from_config
        return nn.ModuleList(make(config.expert_config) for _ in range(config.num_models))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, EnsemblePreTrainedModel):
            init.constant_(module.mixture_M, 1 / self.config.num_models)

    def get_input_embeddings(self) -> nn.Module:
        """Input embeddings of the first classifier (each has its own)."""
        return self._first.get_input_embeddings()

    def _classify(self, batch: dict[str, Tensor | None], labels: Tensor | None) -> EnsembleOutput:
        batch = {name: value for name, value in batch.items() if value is not None and name in self._names}
        logits_BMC = torch.stack([model(**batch, return_dict=True).logits for model in self.models], dim=1)
        logits_BC = mix_models(logits_BMC, self.mixture_M)
        loss = None if labels is None else nn.functional.nll_loss(logits_BC, labels)
        return EnsembleOutput(loss=loss, logits=logits_BC, model_logits=logits_BMC)

    @classmethod
    @torch.no_grad()
    def from_classifier(cls, classifier: PreTrainedModel, num_models: int = 3, seed: int = 0) -> Self:
        """
        Builds an ensemble around one classifier: all start from its backbone, and all but the first from a head drawn
        anew, with the spread of its weights. Equal models would stay equal.

        Args:
            classifier (`PreTrainedModel`):
                The classifier, which is copied.
            num_models (`int`, *optional*, defaults to 3):
                Number M of classifiers.
            seed (`int`, *optional*, defaults to 0):
                Seed of the heads.

        Returns:
            The model, in evaluation mode.

        Raises:
            `ValueError`: If `classifier` is not what the ensemble consists of, or has no head.
        """
        expected = cls.expert_auto_class._model_mapping.get(type(classifier.config), None)
        kinds = expected if isinstance(expected, tuple) else (expected,)
        if not isinstance(classifier, tuple(kind for kind in kinds if kind is not None)):
            raise ValueError(
                f"`classifier` is a {type(classifier).__name__}, which is not what {cls.expert_auto_class.__name__} "
                f"builds: load it with `{cls.expert_auto_class.__name__}.from_pretrained`."
            )
        count = cls.config_class.count_name
        backbone = f"{classifier.base_model_prefix}."
        heads = {n: p for n, p in classifier.named_parameters() if not n.startswith(backbone) and p.dim() > 1}
        if not heads and num_models > 1:
            raise ValueError(
                f"`{count}` is {num_models}, but {type(classifier).__name__} has no weights outside of its "
                f"backbone to draw anew: equal models would stay equal, pass {count}=1."
            )
        ensemble = cls(cls.config_class(expert_config=classifier.config, num_models=num_models))
        ensemble.to(classifier.dtype)  # type: ignore[arg-type]  # transformers' wrapper hides that it is a method
        # In half precision shares of a third would not add up to one.
        shares_M = torch.full(
            (num_models,), 1 / num_models, dtype=torch.promote_types(classifier.dtype, torch.float32)
        )
        ensemble.mixture_M = shares_M
        generator = torch.Generator().manual_seed(seed)
        for index, model in enumerate(ensemble.models):
            state = classifier.state_dict()
            model.load_state_dict({name: state[name] for name in model.state_dict()})
            for name, weight in heads.items() if index else ():
                drawn = torch.randn(weight.shape, generator=generator).to(weight)
                model.get_parameter(name).copy_(drawn * weight.std() + weight.mean())
        return ensemble.eval()


class EnsembleForSequenceClassification(EnsemblePreTrainedModel):
    """
    Text classifiers, whose probabilities are mixed with the weights `mixture_M`.

    Args:
        config ([`EnsembleConfig`]):
            The configuration. Weights are random, those of the mixture equal.
    """

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> EnsembleOutput:
        """
        Classifies a batch.

        Args:
            input_ids, attention_mask, token_type_ids, inputs_embeds (`torch.Tensor`, *optional*):
                As the classifiers take them; what they do not take is not passed on.
            labels (`torch.Tensor` of shape `(B,)`, *optional*):
                Classes; asks for the loss.

        Returns:
            [`EnsembleOutput`]
        """
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        return self._classify(batch | {"token_type_ids": token_type_ids, "inputs_embeds": inputs_embeds}, labels)


class EnsembleForImageClassification(EnsemblePreTrainedModel):
    """
    Image classifiers, whose probabilities are mixed with the weights `mixture_M`.

    Args:
        config ([`EnsembleConfig`]):
            The configuration. Weights are random, those of the mixture equal.
    """

    expert_auto_class = AutoModelForImageClassification
    main_input_name = "pixel_values"
    input_modalities = ["image"]

    @can_return_tuple
    def forward(self, pixel_values: Tensor | None = None, labels: Tensor | None = None) -> EnsembleOutput:
        """
        Classifies a batch.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, num_channels, height, width)`):
                Images.
            labels (`torch.Tensor` of shape `(B,)`, *optional*):
                Classes; asks for the loss.

        Returns:
            [`EnsembleOutput`]
        """
        return self._classify({"pixel_values": pixel_values}, labels)
