"""Adapters in a federated run: putting one into a classifier, and what must hold before rounds start."""

import zlib
from collections.abc import Sequence

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..models import AdaptedClassifier, AdapterExpert, FedMoEPreTrainedModel
from ..models.adapters_fedmoe import peft_config_dict, with_adapters
from .defence_checks import check_products
from .federated_arguments import FederatedTrainingArguments


def add_adapter(model: PreTrainedModel, peft_config: PeftConfig) -> PeftModel:
    """
    `model`, frozen, with an adapter and a classification head that clients train.

    Raises:
        `ValueError`: If the model is a mixture or has an adapter already, or the adapter is none that can be fused.
    """
    if isinstance(model, FedMoEPreTrainedModel):
        raise ValueError(
            "`peft_config` goes into the base, and `model` is a mixture: build it with `from_expert(base, "
            "peft_config=...)`, and leave it out here."
        )
    if isinstance(model, PeftModel):
        raise ValueError("`model` is a `PeftModel`, which has its adapter: leave `peft_config` out.")
    config = peft_config_dict(peft_config)
    config["base_model_name_or_path"] = config.get("base_model_name_or_path") or model.name_or_path or None
    return with_adapters(model, config, ["default"], AdaptedClassifier)


def check_adapters(experts: Sequence[nn.Module], args: FederatedTrainingArguments) -> None:
    """Raises `ValueError` when the experts' adapters cannot be fused as `args` ask; says nothing otherwise."""
    first = experts[0]
    if not isinstance(first, AdapterExpert):
        if args.client_ranks is not None:
            raise ValueError(
                f"`client_ranks` is {args.client_ranks}, but clients train whole models: pass `peft_config=LoraConfig("
                "...)`, or leave it out."
            )
        whole_mixture = isinstance(first, FedMoEPreTrainedModel) and first.config.peft_config is not None
        if whole_mixture and (args.lora_fusion == "ffa" or args.client_parallelism == "sums"):
            raise ValueError(
                f"`lora_fusion` is {args.lora_fusion!r} and `client_parallelism` {args.client_parallelism!r}, but "
                'clients train a whole mixture of adapters, for which there are "svd" or "factors", and "clients".'
            )
        if whole_mixture:
            check_products(args)
        return
    adapters = [expert for expert in experts if isinstance(expert, AdapterExpert)]
    for expert in adapters:
        peft_config_dict(expert.peft_model.peft_config[expert.name])
    largest = vars(first.peft_model.peft_config[first.name]).get("r")
    if args.client_ranks is not None and (largest is None or max(args.client_ranks) > largest):
        raise ValueError(
            f"`client_ranks` is {args.client_ranks}, but the server's adapters have rank {largest}: build them with "
            f"`LoraConfig(r={max(args.client_ranks)})`, or lower the ranks."
        )
    if args.client_parallelism == "sums" and args.lora_fusion == "svd" and largest is not None:
        raise ValueError(
            "`client_parallelism` is 'sums' and `lora_fusion` is 'svd', which needs all uploads at once: choose "
            'client_parallelism="clients", or lora_fusion="ffa".'
        )
    if largest is not None:
        check_products(args)
    if args.lora_fusion == "ffa":
        starts = [_lora_a(expert) for expert in adapters]
        if not starts[0]:
            raise ValueError("`lora_fusion` is 'ffa', but the adapters are no LoRA: leave it out.")
        for expert, other in zip(adapters[1:], starts[1:], strict=True):
            if not all(torch.equal(A, B) for A, B in zip(starts[0], other, strict=True)):
                raise ValueError(
                    f"`lora_fusion` is 'ffa', but A of the adapter {expert.name!r} is another than that of "
                    f"{first.name!r}: FFA-LoRA needs one common A, so build the mixture anew, or take 'svd'."
                )


def base_fingerprint(expert: nn.Module) -> int | None:
    """
    A checksum of the frozen base under an adapter, `None` for a whole model. Checkpoints hold adapters only, and those
    of one base are worth nothing on another of the same shape.
    """
    if not isinstance(expert, AdapterExpert):
        return None
    checksum = 0
    own = {id(tensor) for tensor in expert.parameters()}
    for name, tensor in expert.peft_model.named_parameters():
        # Other adapters are in the checkpoint, and PEFT's copies of the base's head are never used.
        if (
            not tensor.requires_grad
            and id(tensor) not in own
            and "original_module" not in name
            and "lora_" not in name
        ):
            checksum = zlib.crc32(tensor.detach().reshape(-1).view(torch.uint8).cpu().numpy().data, checksum)
    return checksum


def freeze_lora_a(experts: Sequence[nn.Module]) -> None:
    """FFA-LoRA: A keeps its common start, is not trained, and therefore does not travel."""
    for expert in experts:
        if isinstance(expert, AdapterExpert):
            for A in _lora_a(expert):
                A.requires_grad_(False)


def _lora_a(expert: AdapterExpert) -> list[nn.Parameter]:
    return [p for name, p in expert.named_parameters() if ".lora_A." in name or name.endswith(".lora_embedding_A")]
