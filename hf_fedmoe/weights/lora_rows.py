"""
LoRA adapters as parts of rows: fusing rows of models, and clients of a smaller rank.

Shape suffixes: S rows of the server's bank, m uploads, P elements of a row, n results, r rank of an adapter.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from .fusion import fuse_
from .layout import Slot, StateLayout
from .lora_fusion import LoraFactors, fuse_lora_svd


# A direction whose singular value is this small beside the largest is rounding, and would get no gradient either.
_DEAD = 1e-7


@torch.no_grad()
def fuse_models_(
    bank_SP: Tensor, uploads_mP: Tensor, weights_Sm: Tensor, keep_S: Tensor, layout: StateLayout
) -> Tensor:
    """
    [`fuse_`] for rows of `layout`, in place: weights linearly, running variances as of a mixture, and LoRA adapters
    (where `layout.lora` names them) by their products, `s B A <- keep s B A + sum_j w_j s B_j A_j`, cut to the rank of
    the rows by the best approximation there is ([`fuse_lora_svd`]).

    Returns:
        `Tensor` of shape `[S]`: The discarded energy of each row, the share of the squared singular values of all its
        adapters that the cut left out.
    """
    weights_SJ = torch.cat([keep_S.diag().to(weights_Sm), weights_Sm], 1)
    kept_S = bank_SP.new_zeros(len(bank_SP))
    lost_S = kept_S.clone()
    fused = []
    for slots in layout.lora:
        adapters = [_factors(row_P, *slots) for row_P in [*bank_SP, *uploads_mP]]
        results, share_S = fuse_lora_svd(adapters, weights_SJ, slots[0].shape[0])
        # The factors are balanced: the squared norms of A's rows are the singular values.
        energy_S = torch.stack([result.A_ri.square().sum(1).square().sum() for result in results])
        kept_S += energy_S
        lost_S += energy_S * share_S / (1 - share_S)
        fused.append(results)
    fuse_(bank_SP, uploads_mP, weights_Sm, keep_S, layout.batchnorm)
    for slots, results in zip(layout.lora, fused, strict=True):
        for row_P, result in zip(bank_SP, results, strict=True):
            target = _factors(row_P, *slots)
            target.A_ri.copy_(result.A_ri)
            target.B_or.copy_(result.B_or)
    return lost_S / (kept_S + lost_S).clamp_min(torch.finfo(lost_S.dtype).tiny)


def mix_rows(rows_SP: Tensor, weights_nS: Tensor, layout: StateLayout) -> Tensor:
    """New rows `[n, P]`, each the weighted sum of `rows_SP` in the sense of [`fuse_models_`]."""
    mixed_nP = rows_SP.new_zeros(len(weights_nS), layout.size)
    fuse_models_(mixed_nP, rows_SP, weights_nS, rows_SP.new_zeros(len(weights_nS)), layout)
    return mixed_nP


@torch.no_grad()
def fit_rank_(row_P: Tensor, layout: StateLayout, rank: int | None, seed: int) -> None:
    """
    Makes a row, in place, what a client of that rank starts from: the best approximation of the rank, zeros beyond it,
    which get no gradient, and a new start as PEFT's, A random and B zero, for directions within it that the fused
    adapters do not use.

    Args:
        row_P (`Tensor` of shape `[P]`): Changed in place.
        layout ([`StateLayout`]): Of the row.
        rank (`int`, *optional*): Of the client, `None` for all of the row's.
        seed (`int`): Of the new starts.
    """
    generator = torch.Generator().manual_seed(seed)
    for slots in layout.lora:
        target = _factors(row_P, *slots)
        size, in_features = target.A_ri.shape
        if rank is not None and rank < size:
            [ordered], _ = fuse_lora_svd([target], row_P.new_ones(1, 1), size)
            target.A_ri.copy_(ordered.A_ri)
            target.B_or.copy_(ordered.B_or)
        # Drawn whether used or not: what one layer needs must not change the next one's draw.
        bound = in_features**-0.5
        fresh_ri = (torch.rand(size, in_features, generator=generator) * 2 - 1) * bound
        sigma_r = target.A_ri.square().sum(1)
        dead_r = sigma_r <= _DEAD * sigma_r.max()
        target.A_ri[dead_r] = fresh_ri.to(target.A_ri)[dead_r]
        target.B_or[:, dead_r] = 0
        if rank is not None:
            target.A_ri[rank:] = 0
            target.B_or[:, rank:] = 0


def bytes_at_rank(layout: StateLayout, rank: int, shared: Collection[str] | None = None) -> int:
    """Bytes of a row, or of its `shared` tensors, that travels without the directions beyond `rank`."""
    elements = {slot.name: slot.shape.numel() for slot in layout.slots}
    for A, B in layout.lora:
        unused = max(0, A.shape[0] - rank)
        elements[A.name] -= unused * A.shape[1:].numel()
        elements[B.name] -= unused * B.shape[0]
    return sum(n for name, n in elements.items() if shared is None or name in shared) * layout.dtype.itemsize


def _factors(row_P: Tensor, A: Slot, B: Slot) -> LoraFactors:
    """Views of one adapter; those of convolutions as matrices."""
    return LoraFactors(row_P[A.start : A.stop].view(A.shape[0], -1), row_P[B.start : B.stop].view(B.shape[0], -1))
