"""
The server Mixture-of-Experts of Fed-MoE on images. Flat: the file travels to the Hub as it is.

Shape suffixes: B batch, C classes, K routed experts, L of them chosen, S = main + routed experts.
"""

from typing import Any

from torch import Tensor
from transformers import AutoModelForImageClassification, PreTrainedModel
from transformers.utils import can_return_tuple

from .configuration_checks import built
from .configuration_fedmoe import FedMoEConfig
from .mixture_fedmoe import FedMoEOutput
from .modeling_fedmoe import FedMoEPreTrainedModel


class FedMoEForImageClassification(FedMoEPreTrainedModel):
    """
    A mixture of image classifiers: main experts that see every example, routed experts, a gate and the weight alpha.

    Build it with [`~FedMoEForImageClassification.from_expert`] or [`~FedMoEForImageClassification.from_experts`];
    save, load and use it as any other classifier. With BatchNorm experts, call `eval()` before a sparse forward: in
    training mode an expert's statistics would be those of the few examples that it was sent.

    Args:
        config ([`FedMoEConfig`]):
            The configuration. Weights are random, equal in all experts.

    Raises:
        `ValueError`: If experts and gate read different images.
    """

    expert_auto_class = AutoModelForImageClassification
    main_input_name = "pixel_values"
    input_modalities = ["image"]

    def __init__(self, config: FedMoEConfig, base: PreTrainedModel | None = None) -> None:
        if config.gate_config is not None:
            # `image_size` binds some architectures (ViT) and is a mere note in others (MobileNet).
            gate_config, expert_config = built(config.gate_config), built(config.expert_config)
            same = gate_config.model_type == expert_config.model_type
            for field in ("num_channels", "image_size") if same else ("num_channels",):
                expert, gate = (getattr(c, field, None) for c in (expert_config, gate_config))
                if expert is not None and gate is not None and expert != gate:
                    raise ValueError(
                        f"`gate_config.{field}` is {gate}, but `expert_config.{field}` is {expert}: the gate and the "
                        f"experts read the same images, so build the gate with `{field}={expert}`, or take "
                        "`gate='main_features'`."
                    )
        super().__init__(config, base)

    def _check_images(self, pixel_values: Tensor | None) -> None:
        if pixel_values is None:
            return  # the base class names what is missing
        num_channels = getattr(self.config.expert_config, "num_channels", None)
        if pixel_values.dim() != 4 or (num_channels is not None and pixel_values.shape[1] != num_channels):
            raise ValueError(
                f"`pixel_values` has the shape {tuple(pixel_values.shape)}, but the experts' `num_channels` = "
                f"{num_channels} asks for (batch, {num_channels}, height, width): convert the images with an image "
                "processor, or build the experts with the images' `num_channels`."
            )

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        top_l: int | None = None,
        dense: bool | None = None,
        output_expert_logits: bool = False,
        client_prior: Tensor | None = None,
        **inputs: Any,
    ) -> FedMoEOutput:
        """
        Classifies a batch.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, num_channels, height, width)`):
                Images.
            labels (`torch.Tensor` of shape `(B,)`, *optional*):
                Classes; asks for the loss.
            top_l (`int`, *optional*, defaults to `config.top_l`):
                Number L of routed experts per example.
            dense (`bool`, *optional*, defaults to `self.training`):
                `True` mixes all experts (Eq. 1), `False` sends each example to L routed experts only (Eq. 10).
            output_expert_logits (`bool`, *optional*, defaults to `False`):
                Whether to run every expert on every example and return their logits.
            client_prior (`torch.Tensor` of shape `(K,)` or `(B, K)`, *optional*):
                How likely each routed expert is to suit who asks, see [`~models.client_prior`].
            inputs:
                Further tensors for sub-models that name them.

        Returns:
            [`FedMoEOutput`]

        Raises:
            `ValueError`: If the images do not have the experts' shape.
        """
        self._check_images(pixel_values)
        batch = {"pixel_values": pixel_values, **inputs}
        return self._forward(batch, labels, top_l, dense, output_expert_logits, client_prior)
