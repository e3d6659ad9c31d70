"""
LoRA experts of one frozen base, stacked in each layer that they change. Flat: the file travels to the Hub as it is.

Shape suffixes: B batch, T tokens, N positions, E experts (the base first), K = E - 1 owners, r rank, R = K r, I and O
widths of a layer's input and output.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


# The layers that experts can change.
TargetLayer = nn.Linear | Conv1D
# Feed-forward blocks, as transformers calls them in its decoders.
_FEED_FORWARD = "mlp"


class OwnersLora(nn.Module):
    """
    The experts of one layer: for all owners `A_k`, and `B_k` transposed, one below the other. (`B_k` beside one
    another would be as good for long texts, and three times slower for single tokens.)

    Args:
        in_features (`int`): Width of the layer's input.
        out_features (`int`): Width of its output.
        num_owners (`int`): Number K of owners.
        in_use ([`ExpertsInUse`]): Shared by all layers.
        dtype (`torch.dtype`, *optional*): Of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_owners: int,
        in_use: "ExpertsInUse",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_use = in_use
        self.lora_A = nn.Parameter(torch.empty(num_owners * in_use.rank, in_features, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(num_owners * in_use.rank, out_features, dtype=dtype))
        # As PEFT draws it. Here, because transformers has the base initialise what is in it.
        bound = in_features**-0.5
        nn.init.uniform_(self.lora_A, -bound, bound)
        nn.init.zeros_(self.lora_B)

    def forward(self, x_BTI: Tensor, experts: "OneExpert | AllExperts | ChosenExperts") -> Tensor:
        """Returns what these experts add to the layer's output, `(B, T, O)`."""
        if x_BTI.dim() != 3:
            raise ValueError(
                f"A layer with experts reads a tensor of the shape {tuple(x_BTI.shape)}, and weights are given by row "
                "and position: leave this layer out of `target_modules` (its model flattens what it reads)."
            )
        return experts.update(self, x_BTI.to(self.lora_A.dtype))


class OneExpert:
    """
    Uses one expert alone.

    Args:
        rows (`slice`): Its rows of the stacks.
        scale (`float` or `torch.Tensor` of shape `(B, T, 1)`): Of its update, times its weight.
    """

    def __init__(self, rows: slice, scale: float | Tensor) -> None:
        self.rows, self.scale = rows, scale

    def update(self, stack: OwnersLora, x_BTI: Tensor) -> Tensor:
        """Returns `s B_k A_k x`."""
        return nn.functional.linear(x_BTI, stack.lora_A[self.rows]) * self.scale @ stack.lora_B[self.rows]


class AllExperts:
    """
    Uses all experts with weights, in two products.

    Args:
        weights_BTR (`torch.Tensor` of shape `(B, T, R)`): Each expert's weight times its scale, r times.
    """

    def __init__(self, weights_BTR: Tensor) -> None:
        self.weights_BTR = weights_BTR

    def update(self, stack: OwnersLora, x_BTI: Tensor) -> Tensor:
        """Returns `sum_k w_k s B_k A_k x`."""
        return nn.functional.linear(x_BTI, stack.lora_A) * self.weights_BTR @ stack.lora_B


class ChosenExperts:
    """
    Uses each expert on those positions only where it has a weight.

    Args:
        shares (`list[tuple[slice, torch.Tensor, torch.Tensor]]`): For each expert its rows of the stacks, its
            positions in the flattened batch, `(N,)`, and its weights times its scale there, `(N, 1)`.
    """

    def __init__(self, shares: list[tuple[slice, Tensor, Tensor]]) -> None:
        self.shares = shares

    def update(self, stack: OwnersLora, x_BTI: Tensor) -> Tensor:
        """Returns `sum_k w_k s B_k A_k x`, over the experts with a weight."""
        x_NI = x_BTI.flatten(0, 1)
        update_NO = x_NI.new_zeros(len(x_NI), stack.lora_B.shape[1])
        for rows, places_N, weights_N1 in self.shares:
            inner_Nr = nn.functional.linear(x_NI[places_N], stack.lora_A[rows]) * weights_N1
            update_NO = update_NO.index_add(0, places_N, (inner_Nr @ stack.lora_B[rows]).to(update_NO.dtype))
        return update_NO.view(*x_BTI.shape[:2], -1)


class ExpertsInUse:
    """
    Says to all layers which experts a forward uses. Nobody's, between forwards: the base is then the base. One forward
    runs at a time; threads take a copy of the model each.

    Args:
        rank (`int`): Of an expert.
        scale (`float`): Of its update.
    """

    def __init__(self, rank: int, scale: float) -> None:
        self.rank, self.scale = rank, scale
        self.experts: OneExpert | AllExperts | ChosenExperts | None = None

    def rows_of(self, expert: int) -> slice:
        """The rows of the stacks that are an owner's; experts are counted from 1, the base has none."""
        return slice((expert - 1) * self.rank, expert * self.rank)

    def use_one(self, expert: int) -> None:
        """Uses one expert alone, 0 for the base as it is."""
        self.experts = OneExpert(self.rows_of(expert), self.scale) if expert else None

    def use_all(self, weights_BTE: Tensor, dtype: torch.dtype) -> None:
        """Uses all experts with these weights; they are made once for all layers, in the type of the stacks."""
        scaled_BTK = (weights_BTE[..., 1:] * self.scale).to(dtype)
        self.experts = AllExperts(scaled_BTK.repeat_interleave(self.rank, dim=-1))

    def use_chosen(self, weights_BTE: Tensor, dtype: torch.dtype) -> None:
        """Uses the experts with a weight, each where it has one; the cost does not grow with their number."""
        scaled_BTK = (weights_BTE[..., 1:] * self.scale).to(dtype)
        scaled_NK = scaled_BTK.flatten(0, 1)
        places_M, owners_M = (scaled_NK != 0).nonzero().unbind(1)
        # On a GPU the host waits here, and in no layer.
        counts_K = owners_M.bincount(minlength=scaled_NK.shape[1]).tolist()
        order_M = owners_M.argsort(stable=True)
        shares = []
        for owner, places_N in enumerate(places_M[order_M].split(counts_K)):
            if len(places_N):
                shares.append((self.rows_of(owner + 1), places_N, scaled_NK[places_N, owner, None]))
        if len(shares) == 1 and len(places_M) == len(scaled_NK):
            # One expert everywhere, as for a single text whose next token is looked for: there is nothing to gather.
            rows, _, weights_N1 = shares[0]
            self.experts = OneExpert(rows, weights_N1.view(*scaled_BTK.shape[:2], 1))
        else:
            self.experts = ChosenExperts(shares) if shares else None

    def use_none(self) -> None:
        """Uses the base alone."""
        self.experts = None


def _add_experts(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    # A plain function: copies of the model must not run the experts of the original.
    owners: OwnersLora = layer.owners  # type: ignore[assignment]  # torch's stub: any module, or a tensor
    experts = owners.in_use.experts
    if experts is None:
        return output
    return output + owners(args[0], experts).to(output.dtype)


def layer_sizes(layer: TargetLayer) -> tuple[int, int]:
    """Widths of the input and the output of a linear layer."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.nx, layer.nf


def target_layer(base: nn.Module, name: str) -> TargetLayer:
    """The layer of that name, which [`find_targets`] has found in this base or in the one that it is a copy of."""
    layer = base.get_submodule(name)
    assert isinstance(layer, TargetLayer)
    return layer


def stack_of(layer: TargetLayer) -> OwnersLora:
    """The experts of a layer, which [`attach_experts`] has put there."""
    assert isinstance(layer.owners, OwnersLora)
    return layer.owners


def find_targets(base: PreTrainedModel, names: list[str] | None = None) -> dict[str, TargetLayer]:
    """
    Finds the linear layers of a decoder that experts change.

    Args:
        base (`PreTrainedModel`): The decoder.
        names (`list[str]`, *optional*): Of the layers, or ends of their names. Those of the feed-forward blocks if
            left out.

    Raises:
        `ValueError`: If there are none, or a name is none of a linear layer below the head.
    """
    prefix = f"{base.base_model_prefix}."
    linear = {
        name: module
        for name, module in base.named_modules()
        if name.startswith(prefix) and isinstance(module, TargetLayer)
    }
    if names is None:
        found = {name: layer for name, layer in linear.items() if _FEED_FORWARD in name.split(".")[:-1]}
        missing = [] if found else [_FEED_FORWARD]
    else:
        found = {name: layer for name, layer in linear.items() if any(_ends_with(name, end) for end in names)}
        missing = [end for end in names if not any(_ends_with(name, end) for name in linear)]
    if missing:
        ends = sorted({name.split(".")[-1] for name in linear})
        raise ValueError(
            f"`target_modules` is {names!r}, and the {type(base).__name__} has no linear layers {missing} below its "
            f"head; it has {ends[:12]}: name some of these."
        )
    return found


def _ends_with(name: str, end: str) -> bool:
    return f".{name}".endswith(f".{end}")


def attach_experts(
    targets: dict[str, TargetLayer], num_owners: int, in_use: ExpertsInUse, dtype: torch.dtype | None
) -> None:
    """Puts a stack of experts beside each of the layers, whose own names and weights stay as they are."""
    for layer in targets.values():
        layer.add_module("owners", OwnersLora(*layer_sizes(layer), num_owners, in_use, dtype))
        layer.register_forward_hook(_add_experts)


@torch.no_grad()
def merge_expert(layer: TargetLayer, expert: int) -> None:
    """Adds one expert to the weight of its layer, in float32 at least, and takes the stack away."""
    stack = stack_of(layer)
    own = stack.in_use.rows_of(expert)
    if expert:
        weight = layer.weight
        exact = torch.promote_types(weight.dtype, torch.float32)
        update_IO = stack.in_use.scale * (stack.lora_A[own].to(exact).T @ stack.lora_B[own].to(exact))
        update = update_IO if isinstance(layer, Conv1D) else update_IO.T
        layer.weight = nn.Parameter((weight.to(exact) + update).to(weight.dtype), requires_grad=weight.requires_grad)
    del layer.owners
    for key in [key for key, hook in layer._forward_hooks.items() if hook is _add_experts]:
        del layer._forward_hooks[key]


def checkpointed_with(in_use: ExpertsInUse, checkpoint: Callable, function: Callable, *args: Any) -> Any:
    """
    Runs `checkpoint(function, *args)` so that the function, when the backward pass runs it again, uses the experts
    that it used the first time, whatever forwards there were since.

    Args:
        in_use ([`ExpertsInUse`]): The model's.
        checkpoint (`Callable`): As `torch.utils.checkpoint.checkpoint`.
        function (`Callable`): A part of the model.
        args: Of the function.
    """
    experts = in_use.experts

    def again(*inputs: Any) -> Any:
        current, in_use.experts = in_use.experts, experts
        try:
            return function(*inputs)
        finally:
            in_use.experts = current

    return checkpoint(again, *args)
