"""Weighted sums of rows, as several methods need them, and the reports by which clients are weighed.

Shape suffixes: S rows that change, m rows that they take from, P elements of a row.
"""

import torch
from torch import Tensor

from ..federation import Server, Uploads
from ..weights import Payload, fuse_integers, fuse_models_


def mix_(server: Server, rows_SP: Tensor, others_mP: Tensor, weights_Sm: Tensor, keep_S: Tensor | None = None) -> None:
    """rows <- keep * rows + weights @ others, in place; `keep` completes each row's weights to 1 if left out."""
    weights_Sm = weights_Sm.to(rows_SP)
    keep_S = 1 - weights_Sm.sum(1) if keep_S is None else keep_S.to(rows_SP)
    fuse_models_(rows_SP, others_mP, weights_Sm, keep_S, server.layout)


def move_global_(server: Server, uploads: Uploads, weights_m: Tensor) -> None:
    """bank[0] <- (1 - sum_c a_c) bank[0] + sum_c a_c M_c."""
    mix_(server, server.bank_SP[:1], uploads.rows_mP, weights_m[None])
    server.integers[0] = fuse_integers(uploads.integers, weights_m)


def parameter_rows(server: Server, rows_mP: Tensor) -> Tensor:
    """The rows without the running statistics of normalisation layers, `[m, U]`: what distances are measured on."""
    names = {name for name, _ in server.worker.named_parameters()}
    slots = [slot for slot in server.layout.slots if slot.name in names]
    return torch.cat([rows_mP[:, slot.start : slot.stop] for slot in slots], dim=1)


def fault_of_reports(payload: Payload, *names: str) -> str | None:
    """Says which of these numbers an upload does not report, `None` if it reports them all."""
    missing = next((name for name in names if name not in payload.metrics), None)
    return None if missing is None else f"it reports no {missing}, by which it would be weighed"
