"""
Routers that send each token in each layer by itself, on the same experts, to compare with: Arrow (Ostapenko et al.
2024, arXiv 2405.11157), DUME (arXiv 2603.29765), and rows as those of FlexOlmo (arXiv 2507.07024) before training.

Shape suffixes: B batch, T tokens, N positions, K owners, I width of a layer's input.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..models import FedMoEForCausalLM
from ..models.lora_fedmoe_causal import AllExperts, ExpertsInUse, OneExpert, OwnersLora, stack_of


NAMES = ("Arrow, by token and layer", "DUME, by token and layer", "FlexOlmo's rows untrained, by token and layer")
# Sequences of an owner by which routers are found.
SEQUENCES = 24
# A score for each owner from a layer's input, by the layer's experts.
Rows = dict[OwnersLora, Tensor]


class RoutedByLayer:
    """
    Uses all owners' experts, in each layer with weights of its own: the softmax of the layer's input times rows.

    Args:
        rows (`dict[OwnersLora, torch.Tensor]`): For each layer, `(K, I)`.
        in_use ([`ExpertsInUse`]): The mixture's.
        temperature (`float`): Of the softmax.
        absolute (`bool`, *optional*, defaults to `False`): Whether the sign of a score does not count.
    """

    def __init__(self, rows: Rows, in_use: ExpertsInUse, temperature: float, absolute: bool = False) -> None:
        self.rows, self.in_use, self.temperature, self.absolute = rows, in_use, temperature, absolute

    def update(self, stack: OwnersLora, x_BTI: Tensor) -> Tensor:
        """Returns `sum_k w_k s B_k A_k x`."""
        scores_BTK = torch.nn.functional.linear(x_BTI, self.rows[stack].to(x_BTI))
        scores_BTK = scores_BTK.abs() if self.absolute else scores_BTK
        weights_BTK = (scores_BTK / self.temperature).softmax(dim=-1) * self.in_use.scale
        return AllExperts(weights_BTK.repeat_interleave(self.in_use.rank, dim=-1)).update(stack, x_BTI)


class Sums:
    """
    Uses one expert, and sums up what its layers read: `x x^T` over all owners, and `x` of each.

    Args:
        in_use ([`ExpertsInUse`]): The mixture's.
    """

    def __init__(self, in_use: ExpertsInUse) -> None:
        self.in_use = in_use
        self.gram_II: dict[OwnersLora, Tensor] = {}
        self.sums_KI: dict[OwnersLora, list[Tensor]] = {}

    def of_expert(self, expert: int) -> "Sums":
        """Goes on with another expert, from 1."""
        self.alone = OneExpert(self.in_use.rows_of(expert), self.in_use.scale)
        self.owner = expert - 1
        return self

    def update(self, stack: OwnersLora, x_BTI: Tensor) -> Tensor:
        """Returns the expert's update."""
        x_NI = x_BTI.flatten(0, 1).double()
        self.gram_II[stack] = self.gram_II.get(stack, 0) + x_NI.T @ x_NI
        sums = self.sums_KI.setdefault(stack, [])
        if len(sums) == self.owner:
            sums.append(torch.zeros_like(x_NI[0]))
        sums[self.owner] = sums[self.owner] + x_NI.sum(0)
        return self.alone.update(stack, x_BTI)


@torch.no_grad()
def layer_routers(model: FedMoEForCausalLM, texts: dict[str, Tensor], ridge: float = 0.01) -> dict[str, RoutedByLayer]:
    """
    Finds the routers.

    Args:
        model ([`FedMoEForCausalLM`]): The mixture, with the owners first.
        texts (`dict[str, torch.Tensor]`): Sequences of each owner, `(N, T)`, in the experts' order, of which some are
            taken.
        ridge (`float`, *optional*, defaults to 0.01): Penalty of DUME's regression, of the mean diagonal.
    """
    sums, K = Sums(model.in_use), len(texts)
    for expert, ids_NT in enumerate(texts.values(), start=1):
        chosen_NT = ids_NT[:: max(1, len(ids_NT) // SEQUENCES)][:SEQUENCES]
        with using(model, sums.of_expert(expert)):
            model.base(input_ids=chosen_NT.to(model.device), use_cache=False)
    arrow: Rows = {}
    dume: Rows = {}
    flexolmo: Rows = {}
    for layer in model.expert_layers().values():
        stack = stack_of(layer)
        products = (stack.lora_B[rows].T @ stack.lora_A[rows] for rows in map(model.in_use.rows_of, range(1, K + 1)))
        arrow[stack] = torch.stack([torch.linalg.svd(each, full_matrices=False).Vh[0] for each in products])
        gram_II, sums_KI = sums.gram_II[stack], torch.stack(sums.sums_KI[stack])
        penalised_II = gram_II + ridge * gram_II.diagonal().mean() * torch.eye(len(gram_II)).to(gram_II)
        dume[stack] = torch.linalg.solve(penalised_II, sums_KI.T).T
        flexolmo[stack] = torch.nn.functional.normalize(sums_KI, dim=1)
    routers = (
        RoutedByLayer(arrow, model.in_use, 1.0, absolute=True),
        RoutedByLayer(dume, model.in_use, 0.1),
        RoutedByLayer(flexolmo, model.in_use, 1.0),
    )
    return dict(zip(NAMES, routers, strict=True))


@contextmanager
def using(model: FedMoEForCausalLM, experts: Any) -> Iterator[None]:
    """Has the base of a mixture run with experts that no forward of the mixture chooses."""
    model.in_use.experts = experts
    try:
        yield
    finally:
        model.in_use.use_none()
