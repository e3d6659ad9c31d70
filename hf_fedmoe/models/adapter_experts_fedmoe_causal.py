"""
The experts of a mixture of owners of text as adapters of PEFT, which is what clients train in rounds.

Shape suffixes: r rank, I and O widths of a layer's input and output.
"""

import copy
from collections.abc import Mapping

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from .adapters_fedmoe import AdapterExpert, train_adapters_only
from .lora_fedmoe_causal import merge_expert, stack_of, target_layer
from .modeling_fedmoe_causal import FedMoEForCausalLM
from .precision_fedmoe import cast_where_types_meet, to_float32_


# Of a layer's matrix in the state of an expert.
_KEY = "adapter.base_model.model.{layer}.lora_{matrix}.weight"


def adapter_experts(model: FedMoEForCausalLM) -> list[AdapterExpert]:
    """
    Copies the owners' experts into adapters over the layers of the base, in a tree of modules of its own whose frozen
    tensors are those of the mixture. They are float32, whatever the base is.

    Args:
        model ([`FedMoEForCausalLM`]): The mixture.

    Raises:
        `ValueError`: If it has no owners.
    """
    names = [f"expert_{k}" for k in range(1, len(model.config.expert_names))]
    if not names:
        raise ValueError("`owners` is []: name the owners, `FedMoEForCausalLM.from_base(base, owners=[...])`.")
    shared = {id(tensor): tensor for tensor in [*model.base.parameters(), *model.base.buffers()]}
    base = copy.deepcopy(model.base, dict(shared))
    for layer in model.target_names:
        merge_expert(target_layer(base, layer), 0)
    lora_alpha = model.config.lora_alpha
    config = LoraConfig(
        r=model.config.lora_rank,
        lora_alpha=lora_alpha,  # type: ignore[arg-type]  # PEFT computes with any number
        target_modules=list(model.target_names),
        fan_in_fan_out=isinstance(target_layer(base, model.target_names[0]), Conv1D),
    )
    with torch.random.fork_rng(devices=[]):  # PEFT draws a start, which nobody keeps
        peft_model = PeftModel(base, config, names[0])
        for name in names[1:]:
            peft_model.add_adapter(name, config)
    experts = [AdapterExpert(peft_model, name) for name in names]
    to_float32_(parameter for expert in experts for parameter in expert.parameters())
    cast_where_types_meet(peft_model)
    train_adapters_only(peft_model, names)
    for k, expert in enumerate(experts, start=1):
        for tensor, (rows, transposed) in _pairs(model, expert.state_dict(keep_vars=True), k):
            tensor.data.copy_(rows.T if transposed else rows)
    return experts


@torch.no_grad()
def write_expert(model: FedMoEForCausalLM, expert: int, state: Mapping[str, Tensor]) -> None:
    """
    Copies an expert back into the mixture.

    Args:
        model ([`FedMoEForCausalLM`]): Changed.
        expert (`int`): Its index, from 1.
        state (`Mapping[str, torch.Tensor]`): Tensors by their names in an [`AdapterExpert`].
    """
    for tensor, (rows, transposed) in _pairs(model, state, expert):
        rows.copy_(tensor.T if transposed else tensor)


def _pairs(
    model: FedMoEForCausalLM, state: Mapping[str, Tensor], expert: int
) -> list[tuple[Tensor, tuple[Tensor, bool]]]:
    """Each tensor of an expert with its rows of the mixture's stacks, and whether these are its transpose."""
    own, pairs = model.in_use.rows_of(expert), []
    for layer, module in model.expert_layers().items():
        stack = stack_of(module)
        pairs.append((state[_KEY.format(layer=layer, matrix="A")], (stack.lora_A.data[own], False)))
        pairs.append((state[_KEY.format(layer=layer, matrix="B")], (stack.lora_B.data[own], True)))
    return pairs
