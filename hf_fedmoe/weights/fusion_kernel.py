"""
Weighted fusion of rows on a GPU, in one pass over memory. A GEMM with so few rows reaches a fifth of the rate of a
copy there, and this one nearly all of it.

Shape suffixes: S rows of the server's bank, m uploads, P elements of a row; of a program B columns.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl


# Columns and warps of a program, by measurement (`benchmarks/stage_b.py --device cuda`): more columns than threads
# times four registers are slower by a third.
COLUMNS, WARPS = 512, 4


@triton.jit
def _fuse(
    bank_SP,
    uploads_mP,
    weights_Sm,
    keep_S,
    S,
    m,
    P,
    stride_S,
    stride_m,
    S_PADDED: tl.constexpr,
    B: tl.constexpr,
):
    s_S = tl.arange(0, S_PADDED)
    p_B = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside_S, inside_B = s_S < S, p_B < P
    inside_SB = inside_S[:, None] & inside_B[None, :]
    place_SB = bank_SP + s_S.to(tl.int64)[:, None] * stride_S + p_B[None, :]
    keep = tl.load(keep_S + s_S, mask=inside_S, other=0.0)
    fused_SB = tl.load(place_SB, mask=inside_SB, other=0.0) * keep[:, None]
    for j in range(m):
        upload_B = tl.load(uploads_mP + tl.cast(j, tl.int64) * stride_m + p_B, mask=inside_B, other=0.0)
        weight_S = tl.load(weights_Sm + s_S * m + j, mask=inside_S, other=0.0)
        fused_SB += weight_S[:, None] * upload_B[None, :]
    tl.store(place_SB, fused_SB, mask=inside_SB)


def fuse_on_gpu_(bank_SP: Tensor, uploads_mP: Tensor, weights_Sm: Tensor, keep_S: Tensor) -> None:
    """
    bank <- keep * bank + weights @ uploads, in place.

    Args:
        bank_SP (`Tensor` of shape `[S, P]`): On a GPU, in float32 or float64, its rows contiguous.
        uploads_mP (`Tensor` of shape `[m, P]`): Likewise.
        weights_Sm (`Tensor` of shape `[S, m]`): Of the same type and device.
        keep_S (`Tensor` of shape `[S]`): Likewise.
    """
    (S, P), m = bank_SP.shape, len(uploads_mP)
    with torch.cuda.device(bank_SP.device):
        _fuse[(triton.cdiv(P, COLUMNS),)](
            bank_SP,
            uploads_mP,
            weights_Sm.contiguous(),
            keep_S.contiguous(),
            S,
            m,
            P,
            bank_SP.stride(0),
            uploads_mP.stride(0),
            S_PADDED=triton.next_power_of_2(S),
            B=COLUMNS,
            num_warps=WARPS,
        )
