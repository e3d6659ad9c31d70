"""Weighted fusion of rows: one in-place GEMM over contiguous memory, on a GPU a kernel of our own.

Shape suffixes: S rows of the server's bank, m uploads, P elements of a row, F features of a BatchNorm layer.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .layout import Slot


# Triton comes with PyTorch for GPUs, on Linux.
fuse_on_gpu_: Callable[[Tensor, Tensor, Tensor, Tensor], None] | None
try:
    from .fusion_kernel import fuse_on_gpu_
except ImportError:
    fuse_on_gpu_ = None

# Columns fused at a time. On a CPU the slices of all rows stay in the second-level cache between the two passes over
# them; on a GPU a launch has to be worth it.
_COLUMNS = {"cpu": 131_072, "cuda": 33_554_432}


@torch.no_grad()
def fuse_(
    bank_SP: Tensor,
    uploads_mP: Tensor,
    weights_Sm: Tensor,
    keep_S: Tensor,
    batchnorm: tuple[tuple[Slot, Slot], ...] = (),
    reduce_: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """
    bank <- keep * bank + weights @ uploads, in place (Fed-MoE Eq. 6; FedAvg is one row with keep = 0).

    Running variances follow the rule for a mixture instead, `sum w (var + mean^2) - fused_mean^2`: their plain average
    leaves out the spread of the means. With T updates in a row, call it once with the collapsed weights
    ([`collapse`]).

    Args:
        bank_SP (`Tensor` of shape `[S, P]`): Changed in place.
        uploads_mP (`Tensor` of shape `[m, P]`): The clients' rows.
        weights_Sm (`Tensor` of shape `[S, m]`): What each row takes of each upload.
        keep_S (`Tensor` of shape `[S]`): What each row keeps of itself. For an average, `keep + weights.sum(1) == 1`.
        batchnorm (`tuple`, *optional*): [`StateLayout.batchnorm`], the (mean, variance) slots.
        reduce_ (`Callable`, *optional*): Of several processes, each of which calls this with other uploads, makes a
            tensor the sum of those of all, in the one whose bank counts.

    Returns:
        `Tensor`: `bank_SP`.
    """
    weights_Sm, keep_S = weights_Sm.to(bank_SP.dtype), keep_S.to(bank_SP.dtype)
    keep_S1 = keep_S[:, None]
    fused_variances = []
    for mean, variance in batchnorm:
        own, taken = (
            rows[:, variance.start : variance.stop] + rows[:, mean.start : mean.stop].square()
            for rows in (bank_SP, uploads_mP)
        )
        taken = weights_Sm @ taken
        if reduce_ is not None:
            reduce_(taken)
        fused_variances.append(keep_S1 * own + taken)
    if reduce_ is None and fuse_on_gpu_ is not None and _fits_kernel(bank_SP, uploads_mP):
        fuse_on_gpu_(bank_SP, uploads_mP, weights_Sm, keep_S)
    else:
        _fuse_blocks_(bank_SP, uploads_mP, weights_Sm, keep_S1, reduce_)
    for (mean, variance), second_moment_SF in zip(batchnorm, fused_variances, strict=True):
        fused_mean_SF = bank_SP[:, mean.start : mean.stop]
        # Rounding may bring one of almost 0 below.
        bank_SP[:, variance.start : variance.stop] = (second_moment_SF - fused_mean_SF.square()).clamp_min_(0)
    return bank_SP


def _fits_kernel(bank_SP: Tensor, uploads_mP: Tensor) -> bool:
    return (
        bank_SP.is_cuda
        and bank_SP.dtype == uploads_mP.dtype
        and bank_SP.dtype in (torch.float32, torch.float64)
        and bank_SP.stride(1) == uploads_mP.stride(1) == 1
    )


def _fuse_blocks_(
    bank_SP: Tensor,
    uploads_mP: Tensor,
    weights_Sm: Tensor,
    keep_S1: Tensor,
    reduce_: Callable[[Tensor], None] | None,
) -> None:
    """bank <- keep * bank + weights @ uploads, block of columns by block."""
    for block_SP, block_mP in zip(
        *(rows.split(_COLUMNS.get(bank_SP.device.type, rows.shape[1]), dim=1) for rows in (bank_SP, uploads_mP)),
        strict=True,
    ):
        if reduce_ is None:
            block_SP.mul_(keep_S1).addmm_(weights_Sm, block_mP)
        else:
            reduce_(taken := weights_Sm @ block_mP)
            block_SP.mul_(keep_S1).add_(taken)


@torch.no_grad()
def add_to_sum_(sum_P: Tensor, row_P: Tensor, weight: float, batchnorm: tuple[tuple[Slot, Slot], ...] = ()) -> None:
    """
    sum <- sum + weight * row, for an average of rows of which only one is in memory at a time, see [`mean_of_sum_`].

    Args:
        sum_P (`Tensor` of shape `[P]`): Changed in place; zeros at first. Running variances are second moments here.
        row_P (`Tensor` of shape `[P]`): Overwritten.
        weight (`float`): Of the row.
        batchnorm (`tuple`, *optional*): [`StateLayout.batchnorm`], the (mean, variance) slots.
    """
    for mean, variance in batchnorm:
        row_P[variance.start : variance.stop] += row_P[mean.start : mean.stop].square()
    sum_P.add_(row_P, alpha=weight)


@torch.no_grad()
def mean_of_sum_(sum_P: Tensor, total: float, batchnorm: tuple[tuple[Slot, Slot], ...] = ()) -> None:
    """The sum of [`add_to_sum_`] becomes the average that [`fuse_`] would have given; its weights sum to `total`."""
    sum_P /= total
    for mean, variance in batchnorm:
        sum_P[variance.start : variance.stop].sub_(sum_P[mean.start : mean.stop].square()).clamp_min_(0)


def collapse(weights_TSm: Tensor, keep_S: Tensor) -> tuple[Tensor, Tensor]:
    """
    T fusions of the same uploads in a row as one: (weights `[S, m]`, keep `[S]`) for [`fuse_`].

    E <- keep^T E + sum_t keep^(T - 1 - t) W_t M.
    """
    num_steps = weights_TSm.shape[0]
    powers_T = torch.arange(num_steps - 1, -1, -1, device=keep_S.device)
    weights_Sm = (keep_S[None, :, None] ** powers_T[:, None, None] * weights_TSm).sum(0)
    return weights_Sm, keep_S**num_steps


def fuse_integers(uploads: list[dict[str, Tensor]], weights_m: Tensor) -> dict[str, Tensor]:
    """Integer buffers are taken, not averaged: copies of those of the upload that weighs most."""
    # Copies: two experts may take those of the same client, and a file of tensors that share memory is refused.
    return {name: tensor.clone() for name, tensor in uploads[int(weights_m.argmax())].items()}
