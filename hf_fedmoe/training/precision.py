"""Precision of weights: trained and fused ones are float32, frozen ones under adapters stay as they are stored."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from packaging.version import Version
from peft import PeftModel
from torch import Tensor, nn
from transformers.utils import logging

from ..models import FedMoEForCausalLM
from ..models.adapters_fedmoe import ids_of_adapters
from ..models.precision_fedmoe import HALF_PRECISION, cast_where_types_meet, to_float32_


logger = logging.get_logger(__name__)


def train_in_float32(model: nn.Module, log: bool = True) -> None:
    """
    Makes a model that was loaded in half precision float32, in place, and says so once. Transformers loads models as
    they are stored, and averages, optimizers and running statistics need the digits. Only the frozen base under
    adapters keeps its type; a whole model is raised with its frozen parts, since its layers must agree.

    Args:
        model (`nn.Module`): What a run trains, a `PeftModel` or a mixture of adapters included.
        log (`bool`, *optional*, defaults to `True`): Whether this process is the one that says so.
    """
    tensors = list(_trained(model))
    stored = sorted({str(tensor.dtype) for tensor in tensors if tensor.dtype in HALF_PRECISION})
    added = to_float32_(tensors)
    if added and log:
        logger.warning(
            f"The model is stored in {' and '.join(stored)} and becomes torch.float32, which takes {added / 1e6:.1f} "
            "MB more: what is trained and fused needs the digits. For faster training set `bf16=True`; load the "
            "result with `dtype=torch.bfloat16` to use it in half precision."
        )


@contextmanager
def without_tf32() -> Iterator[None]:
    """
    Computes products of float32 in a block as such: on a GPU those of convolutions are TF32 unless told, which keeps
    10 of 23 bits.
    """
    # Whose attributes are made when they are asked for, which type checkers do not see.
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    if Version(torch.__version__) < Version("2.9"):
        before = matmul.allow_tf32, cudnn.allow_tf32
        matmul.allow_tf32 = cudnn.allow_tf32 = False
        try:
            yield
        finally:
            matmul.allow_tf32, cudnn.allow_tf32 = before
        return
    places = (matmul, cudnn.conv, cudnn.rnn)
    precisions = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, precision in zip(places, precisions, strict=True):
            place.fp32_precision = precision


def _trained(model: nn.Module) -> Iterator[Tensor]:
    """All parameters and buffers but those of frozen bases under adapters."""
    bases: set[int] = set()
    for module in model.modules():
        if isinstance(module, FedMoEForCausalLM):
            tensors = [*module.base.named_parameters(), *module.base.named_buffers()]
            bases |= {id(tensor) for name, tensor in tensors if "owners" not in name.split(".")}
        if isinstance(module, PeftModel):
            cast_where_types_meet(module)
            own = ids_of_adapters(module, list(module.peft_config))
            bases |= {id(tensor) for tensor in [*module.parameters(), *module.buffers()]} - own
    yield from (tensor for tensor in [*model.parameters(), *model.buffers()] if id(tensor) not in bases)
