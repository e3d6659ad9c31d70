"""
LoRA adapters as parts of rows: fusing rows of models, and clients of a smaller rank.

Rows that are changed here keep their basis ([`in_basis_of`]): an entry of A or B means in the next round what it meant
in the last one, to whoever remembers entries: momentum of a server, an optimizer or a residual that stays with a
client.

Shape suffixes: S rows of the server's bank, m uploads, P elements of a row, n results, r rank of an adapter.
"""

import torch
from torch import Tensor

from .fusion import fuse_
from .layout import Slot, StateLayout
from .lora_fusion import LoraFactors, fuse_lora_svd, in_basis_of, mean_start


# A direction of the rank space with this share of the largest of A and of B gets (next to) no gradient.
_DEAD = 1e-6


@torch.no_grad()
def fuse_models_(
    bank_SP: Tensor, uploads_mP: Tensor, weights_Sm: Tensor, keep_S: Tensor, layout: StateLayout
) -> Tensor:
    """
    [`fuse_`] for rows of `layout`, in place: weights linearly, running variances as of a mixture, and LoRA adapters
    (where `layout.lora` names them) by their products, `s B A <- keep s B A + sum_j w_j s B_j A_j`, cut to the rank of
    the rows by the best approximation there is ([`fuse_lora_svd`]) and written in the basis that each row had.

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
        starts = [mean_start(adapters, *row) for row in zip(weights_SJ, adapters, strict=False)]
        fused.append([in_basis_of(*pair) for pair in zip(results, starts, strict=True)])
    fuse_(bank_SP, uploads_mP, weights_Sm, keep_S, layout.batchnorm)
    for slots, results in zip(layout.lora, fused, strict=True):
        for row_P, result in zip(bank_SP, results, strict=True):
            _copy_(result, _factors(row_P, *slots))
    return lost_S / (kept_S + lost_S).clamp_min(torch.finfo(lost_S.dtype).tiny)


def mix_rows(rows_SP: Tensor, weights_nS: Tensor, layout: StateLayout) -> Tensor:
    """New rows `[n, P]`, each the weighted sum of `rows_SP` by [`fuse_models_`], in the basis of the first one."""
    mixed_nP = rows_SP[:1].repeat(len(weights_nS), 1)
    fuse_models_(mixed_nP, rows_SP, weights_nS, rows_SP.new_zeros(len(weights_nS)), layout)
    return mixed_nP


@torch.no_grad()
def fit_rank_(row_P: Tensor, layout: StateLayout, rank: int | None, seed: int) -> None:
    """
    Makes a row, in place, what a client of that rank starts from: the best approximation of the rank in the basis of
    the row's first directions, zeros beyond it, which get no gradient, and a new start as PEFT's, A random and B zero,
    for directions within it that have nothing in A nor in B.

    Args:
        row_P (`Tensor` of shape `[P]`): Changed in place.
        layout ([`StateLayout`]): Of the row.
        rank (`int`, *optional*): Of the client, `None` for all of the row's.
        seed (`int`): Of the new starts.
    """
    for number, slots in enumerate(layout.lora):
        target = _factors(row_P, *slots)
        if rank is not None and rank < len(target.A_ri):
            [cut], _ = fuse_lora_svd([target], row_P.new_ones(1, 1), rank)
            first = LoraFactors(target.A_ri[:rank], target.B_or[:, :rank])
            _copy_(in_basis_of(cut, first), first)
            target.A_ri[rank:] = 0
            target.B_or[:, rank:] = 0
            target = first
        _start_dead_directions_(target, seed + number)


def _start_dead_directions_(target: LoraFactors, seed: int) -> None:
    """Directions of the rank space in which there is neither A nor B start anew."""
    A_ri, B_or = target.A_ri.double(), target.B_or.double()
    of_A_rr = A_ri @ A_ri.T
    if torch.linalg.eigvalsh(of_A_rr)[0] > _DEAD**2 * of_A_rr.trace():
        return
    sizes_rr = sum(rr / rr.trace().clamp_min(torch.finfo(rr.dtype).tiny) for rr in (of_A_rr, B_or.T @ B_or))
    energy_r, directions_rr = torch.linalg.eigh(sizes_rr)
    dead_rd = directions_rr[:, energy_r <= _DEAD**2]
    generator = torch.Generator().manual_seed(seed)
    fresh_ri = ((torch.rand(A_ri.shape, generator=generator) * 2 - 1) * A_ri.shape[1] ** -0.5).to(A_ri)
    target.A_ri.copy_(A_ri + dead_rd @ (dead_rd.T @ (fresh_ri - A_ri)))
    target.B_or.copy_(B_or - B_or @ dead_rd @ dead_rd.T)


@torch.no_grad()
def widen_rank_(row_P: Tensor, start_P: Tensor, layout: StateLayout, rank: int) -> None:
    """
    Writes what a client of a smaller rank has made of `start_P` ([`fit_rank_`]) in the basis of that row, in place.
    Its update B A is the same; entries compare with those of the other clients and of the server.
    """
    for slots in layout.lora:
        target, start = _factors(row_P, *slots), _factors(start_P, *slots)
        if rank < len(start.A_ri):
            [found], _ = fuse_lora_svd([target], row_P.new_ones(1, 1), len(start.A_ri))
            _copy_(in_basis_of(found, start), target)


def sizes_at_rank(layout: StateLayout, rank: int) -> dict[str, int]:
    """Bytes of each adapter's A and B, when they travel without the directions beyond `rank`."""
    return {
        slot.name: layout.sizes[slot.name] // A.shape[0] * min(rank, A.shape[0])
        for A, B in layout.lora
        for slot in (A, B)
    }


def _factors(row_P: Tensor, A: Slot, B: Slot) -> LoraFactors:
    """Views of one adapter; those of convolutions as matrices."""
    return LoraFactors(row_P[A.start : A.stop].view(A.shape[0], -1), row_P[B.start : B.stop].view(B.shape[0], -1))


def _copy_(source: LoraFactors, target: LoraFactors) -> None:
    target.A_ri.copy_(source.A_ri)
    target.B_or.copy_(source.B_or)
