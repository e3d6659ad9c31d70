"""Weighted sums of LoRA adapters, without ever forming the dense matrices.

A stack is a list of adapters s B A of one layer, beside the weights that each fused row takes of them.

Shape suffixes: S fused rows (experts or clients), J adapters of a stack, r rank of an adapter, R sum of the ranks of a
stack, i in features, o out features.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


# What is this many roundings of the largest singular value, or less, is rounding: fusions of equal adapters leave 20.
_ROUNDINGS = 64
# An old A that has less than this share of what balanced factors have in a direction is no basis there.
_THIN = 1e-2


@dataclass(frozen=True)
class LoraFactors:
    """
    One adapter of one linear layer: its update of the weight is `scaling * B_or @ A_ri`.

    Args:
        A_ri (`Tensor` of shape `[r, in_features]`): PEFT's `lora_A.weight`.
        B_or (`Tensor` of shape `[out_features, r]`): PEFT's `lora_B.weight`.
        scaling (`float`, *optional*, defaults to 1.0): `lora_alpha / r`, or `lora_alpha / sqrt(r)` with rsLoRA.
    """

    A_ri: Tensor
    B_or: Tensor
    scaling: float = 1.0

    def __post_init__(self) -> None:
        shapes = f"A is {tuple(self.A_ri.shape)} and B is {tuple(self.B_or.shape)}"
        if self.A_ri.ndim != 2 or self.B_or.ndim != 2 or self.A_ri.shape[0] != self.B_or.shape[1]:
            raise ValueError(
                f"{shapes}, expected [r, in_features] and [out_features, r] with one r: pass the factors of one "
                "adapter of one linear layer."
            )
        if self.A_ri.shape[0] == 0:
            raise ValueError(f"{shapes}, an adapter of rank 0: leave out layers without an adapter.")
        if not math.isfinite(self.scaling):
            raise ValueError(f"`scaling` is {self.scaling}: pass the finite `lora_alpha / r` of the adapter.")


@torch.no_grad()
def fuse_lora_stack(adapters: Sequence[LoraFactors], weights_SJ: Tensor, scaling: float = 1.0) -> list[LoraFactors]:
    """
    sum_j w_sj s_j B_j A_j for each row s, exactly, at rank R. Ranks and scalings may differ, weights may be negative.

    All rows share one tensor A, so that `A @ x` can be computed once for all of them (clone it before it is written to
    a file); the weights stand in B. Both fusions compute and return at least float32.

    Args:
        adapters (`Sequence[LoraFactors]`): The J adapters of one layer.
        weights_SJ (`Tensor` of shape `[S, J]`): What each row takes of each adapter, without the adapters' scalings.
        scaling (`float`, *optional*, defaults to 1.0):
            Of the results; their factors are divided accordingly. Pass that of the configuration that will load them.

    Returns:
        `list[LoraFactors]`: One of rank R for each row.
    """
    A_Ri, B_oR, weights_SR = _stack(adapters, weights_SJ, scaling)
    return [LoraFactors(A_Ri, B_oR * weights_R, scaling) for weights_R in weights_SR]


@torch.no_grad()
def fuse_lora_svd(
    adapters: Sequence[LoraFactors], weights_SJ: Tensor, rank: int, scaling: float = 1.0
) -> tuple[list[LoraFactors], Tensor]:
    """
    The best approximation of rank `rank` to each row of [`fuse_lora_stack`], and what it leaves out.

    QR of both stacked factors and SVD of the small core, equal to the truncated SVD of the dense sum (Eckart-Young).
    The factors are balanced: `A A^T == B^T B`, diagonal, the singular values over `scaling` in descending order. So
    the best approximation of a smaller rank is a prefix.

    Every result has exactly `rank` directions, as a PEFT configuration demands. Where the stack has fewer, the rest is
    zero in A *and* in B (where only the sum has fewer, almost zero). Such a direction gets no gradient: give its row
    of A new values before training it on; with B at zero the update stays the same.

    Args:
        adapters (`Sequence[LoraFactors]`): The J adapters of one layer.
        weights_SJ (`Tensor` of shape `[S, J]`): What each row takes of each adapter, without the adapters' scalings.
        rank (`int`): Of the results.
        scaling (`float`, *optional*, defaults to 1.0): Of the results.

    Returns:
        `tuple[list[LoraFactors], Tensor]`: One adapter for each row, and the discarded energy `[S]`, the share of the
        squared singular values that was left out (0 for a sum that is zero).
    """
    if rank < 1:
        raise ValueError(f"`rank` is {rank}: pass the rank of the fused adapters, at least 1.")
    A_Ri, B_oR, weights_SR = _stack(adapters, weights_SJ, scaling)
    fused, discarded = [], []
    for weights_R in weights_SR:
        # An expert takes nothing of the other experts' old factors: without them the core is a fraction of the stack.
        taken_R = (weights_R != 0).nonzero()[:, 0]  # a GPU is waited for once, and by each mask again
        basis_iq, core_A = torch.linalg.qr(A_Ri[taken_R].T)
        basis_op, core_B = torch.linalg.qr(B_oR[:, taken_R] * weights_R[taken_R])
        U, sigma, Vh = torch.linalg.svd(core_B @ core_A.T, full_matrices=False)
        root_r = sigma[:rank].sqrt()
        missing = rank - len(root_r)
        A_ri = root_r[:, None] * (Vh[:rank] @ basis_iq.T)
        B_or = basis_op @ U[:, :rank] * root_r
        fused.append(LoraFactors(pad(A_ri, (0, 0, 0, missing)), pad(B_or, (0, missing)), scaling))
        energy = sigma.square()
        total = energy.sum()
        discarded.append(torch.where(total > 0, energy[rank:].sum() / total, 0.0))
    return fused, torch.stack(discarded)


@torch.no_grad()
def in_basis_of(fused: LoraFactors, old: LoraFactors) -> LoraFactors:
    """
    Gives the update of a fused adapter the factors that go on from old ones, so that entries mean what they meant.

    Of one update there are as many factors as there are bases of the rank space, and an SVD picks one anew each time:
    momentum, moments and residuals of the entries would point elsewhere. Here A is the old A, whose row space turns
    into that of the update by the least rotation (orthogonal Procrustes between the two), and B follows. The update of
    the old factors gives the old factors, an update within the old row space the old A. Directions that the update
    does not use keep the old A and have zeros in B, as at PEFT's start.

    Args:
        fused ([`LoraFactors`]): From [`fuse_lora_svd`], at most of the old rank.
        old ([`LoraFactors`]):
            The factors to go on from. Where their A has (next to) nothing, the new ones are balanced.

    Returns:
        [`LoraFactors`]: Of the old rank, with the scaling of `fused`.
    """
    A_ri, B_or = old.A_ri.to(fused.A_ri), old.B_or.to(fused.B_or)
    sigma_r = fused.A_ri.square().sum(1)
    noise = _ROUNDINGS * torch.finfo(sigma_r.dtype).eps * sigma_r.max()
    live_r = (sigma_r > noise).nonzero()[:, 0]  # as above, a GPU is waited for by each mask
    # The update is U_op sigma_p V_pi, the old A is its U s_k V_ki; k = min(r, i), p <= k.
    sigma_p1 = sigma_r[live_r, None]
    V_pi, U_op = fused.A_ri[live_r] / sigma_p1.sqrt(), fused.B_or[:, live_r] / sigma_p1[:, 0].sqrt()
    U_rk, s_k, V_ki = torch.linalg.svd(A_ri, full_matrices=False)
    # Of the update's rows outside of the old row space only the q directions that are more than rounding are followed.
    inside_pk = V_pi @ V_ki.T
    outside_pi = V_pi - inside_pk @ V_ki
    _, strength_p, new_pi = torch.linalg.svd(sigma_p1 * outside_pi, full_matrices=False)
    basis_Ki = torch.cat([V_ki, new_pi[strength_p > noise]])  # K = k + q
    rows_pK = torch.cat([inside_pk, outside_pi @ basis_Ki[len(V_ki) :].T], 1)
    turn_pp, sigma_p, rows_pK = torch.linalg.svd(sigma_p1 * rows_pK, full_matrices=False)
    live_p = (sigma_p > noise).nonzero()[:, 0]
    rows_pK = rows_pK[live_p]
    # The rotation of the rank space under which these rows are nearest to the old ones.
    Y_kp, _, Zt_pp = torch.linalg.svd(rows_pK[:, : len(V_ki)].T, full_matrices=False)
    nearest_kp = Y_kp @ Zt_pp
    frame_ki = V_ki
    if len(basis_Ki) > len(V_ki):
        old_pK = pad(nearest_kp.T, (0, len(basis_Ki) - len(V_ki)))
        frame_ki = V_ki + nearest_kp @ (rows_pK - old_pK) @ basis_Ki
    W_ok = U_op @ (turn_pp * sigma_p)[:, live_p] @ nearest_kp.T
    balanced_k = W_ok.norm(dim=0).sqrt()
    balanced_k[balanced_k.square() <= noise] = 0
    size_k = torch.where(s_k < _THIN * balanced_k, balanced_k, s_k)
    used_k = (size_k > torch.finfo(size_k.dtype).eps * size_k.max()).nonzero()[:, 0]
    A_ri = A_ri + U_rk @ (size_k[:, None] * frame_ki - s_k[:, None] * V_ki)
    U_rk = U_rk[:, used_k]
    # What A does not see of B is no part of the update, and stays.
    B_or = W_ok[:, used_k] / size_k[used_k] @ U_rk.T + (B_or - B_or @ U_rk @ U_rk.T)
    return LoraFactors(A_ri, B_or, fused.scaling)


@torch.no_grad()
def mean_start(adapters: Sequence[LoraFactors], weights_J: Tensor, old: LoraFactors) -> LoraFactors:
    """
    Averages what [`in_basis_of`] should go on from when adapters were trained: the weighted mean of their A, each
    rotated to the old one (orthogonal Procrustes), so that A grows and shrinks as it did at those who trained it.

    Args:
        adapters (`Sequence[LoraFactors]`): The J adapters of one layer, of one rank.
        weights_J (`Tensor` of shape `[J]`): What the sum takes of each.
        old ([`LoraFactors`]): The factors before.

    Returns:
        [`LoraFactors`]: The mean, with the old B; the old factors if the weights sum to nothing.
    """
    taken_J = weights_J != 0
    total = weights_J.sum()
    if not total.abs() > 0:
        return old
    dtype = torch.promote_types(old.A_ri.dtype, torch.float32)
    A_Jri = torch.stack([adapter.A_ri.to(dtype) for adapter, w in zip(adapters, taken_J.tolist(), strict=True) if w])
    U_Jrr, _, Vt_Jrr = torch.linalg.svd(old.A_ri.to(dtype) @ A_Jri.mT)
    A_ri = torch.einsum("j,jrs,jsi->ri", (weights_J[taken_J] / total).to(A_Jri), U_Jrr @ Vt_Jrr, A_Jri)
    return LoraFactors(A_ri, old.B_or, old.scaling)


def _stack(adapters: Sequence[LoraFactors], weights_SJ: Tensor, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """A_Ri, B_oR and the weights [S, R] between them, scalings included."""
    scaled_SJ = _scaled(adapters, weights_SJ, scaling)
    A_Ri = torch.cat([adapter.A_ri for adapter in adapters]).to(scaled_SJ)
    B_oR = torch.cat([adapter.B_or for adapter in adapters], 1).to(scaled_SJ)
    ranks_J = torch.tensor([adapter.A_ri.shape[0] for adapter in adapters], device=A_Ri.device)
    return A_Ri, B_oR, scaled_SJ.repeat_interleave(ranks_J, 1, output_size=len(A_Ri))


def _scaled(adapters: Sequence[LoraFactors], weights_SJ: Tensor, scaling: float) -> Tensor:
    """w_sj s_j / scaling, in the dtype and on the device of the fusion; raises `ValueError` on what does not fit."""
    if weights_SJ.ndim != 2 or weights_SJ.shape[1] != len(adapters) or not adapters:
        raise ValueError(
            f"`weights_SJ` is {tuple(weights_SJ.shape)} for {len(adapters)} adapters: pass at least one adapter, and "
            "a matrix with one row for each result and one column for each adapter."
        )
    if not (math.isfinite(scaling) and scaling > 0):
        raise ValueError(f"`scaling` is {scaling}: pass the positive `lora_alpha / r` of the results.")
    # QR and SVD know no shorter type, and sums of many adapters need the digits.
    dtype, first = torch.float32, adapters[0]
    for index, adapter in enumerate(adapters):
        features, expected = ((each.A_ri.shape[1], each.B_or.shape[0]) for each in (adapter, first))
        if features != expected:
            raise ValueError(
                f"Adapter {index} has (in_features, out_features) = {features}, adapter 0 has {expected}: fuse the "
                "adapters of one layer at a time, from clients with one base model."
            )
        dtype = torch.promote_types(dtype, torch.promote_types(adapter.A_ri.dtype, adapter.B_or.dtype))
    device = first.A_ri.device
    scaling_J = torch.tensor([adapter.scaling / scaling for adapter in adapters], dtype=dtype, device=device)
    return weights_SJ.to(scaling_J) * scaling_J
