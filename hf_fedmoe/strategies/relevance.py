"""The relevance of clients to experts: the correlation of Fed-MoE (Eq. 3-5) and its reductions.

Shape suffixes: R reserved examples, K routed experts, S experts (main ones first), m clients.
"""

import torch
from torch import Tensor


CORRELATIONS = ("relevance", "centered", "sum", "mean")


def correlate(Q_RK: Tensor, P_y_mR: Tensor, correlation: str, temperature: float = 1.0) -> Tensor:
    """
    W `[K, m]`: how well client j predicts the examples that the gate sends to expert k.

    The paper writes Q^T P_y and leaves the reduction over the reserved set open:

    - `"sum"`: the plain product. It grows with R, so that its softmax ends with one client per expert.
    - `"mean"`: divided by R. Its softmax is almost uniform, that is FedAvg.
    - `"centered"`: the mean, less each client's own mean over experts, times sqrt(R): sharpness independent of R.
    - `"relevance"`: the mean over each expert's own examples (divided by sum_x Q_k), less each client's mean, then
      less each expert's mean, times sqrt(R): a client that is good everywhere wins no row by that alone.

    Args:
        Q_RK (`Tensor` of shape `[R, K]`): Gate probabilities.
        P_y_mR (`Tensor` of shape `[m, R]`): Each client's probability of the true class.
        correlation (`str`): One of the four above.
        temperature (`float`, *optional*, defaults to 1.0): W is divided by it.
    """
    product_Km = Q_RK.T @ P_y_mR.T
    num_reserved = Q_RK.shape[0]
    if correlation == "sum":
        W_Km = product_Km
    elif correlation == "mean":
        W_Km = product_Km / num_reserved
    elif correlation == "centered":
        mean_Km = product_Km / num_reserved
        W_Km = (mean_Km - mean_Km.mean(0, keepdim=True)) * num_reserved**0.5
    elif correlation == "relevance":
        mean_Km = product_Km / Q_RK.sum(0)[:, None].clamp_min(torch.finfo(Q_RK.dtype).tiny)
        by_client_Km = mean_Km - mean_Km.mean(0, keepdim=True)
        W_Km = (by_client_Km - by_client_Km.mean(1, keepdim=True)) * num_reserved**0.5
    else:
        raise ValueError(f"`correlation` is {correlation!r}: choose one of {', '.join(map(repr, CORRELATIONS))}.")
    return W_Km / temperature


def client_mixture(W_Km: Tensor, alpha: Tensor, num_main_experts: int) -> Tensor:
    """
    W^c `[S, m]` (Eq. 11-12): what each client takes of each expert, the softmax over experts of
    cat(1 - alpha, alpha W). Several main experts share the main part's logit; without one only alpha W is left.
    """
    main_Sm = (1 - alpha) * W_Km.new_ones(num_main_experts, W_Km.shape[1])
    return torch.cat([main_Sm, alpha * W_Km]).softmax(0)


def above_floor(P_y_mR: Tensor, sent_mR: Tensor, floor: float) -> Tensor:
    """
    Tells of each client `[m]` whether its model is at least `floor` times as good on the reserved set as the one that
    it was sent: by the mean probability of the true class, which one example alone cannot spoil.

    Args:
        P_y_mR (`Tensor` of shape `[m, R]`): Its probabilities of the true classes.
        sent_mR (`Tensor` of shape `[m, R]` or `[1, R]`): Those of what it was sent.
        floor (`float`): 1 for no worse.
    """
    return P_y_mR.mean(1) >= floor * sent_mR.mean(1)


def capped(share_Km: Tensor, cap: float) -> Tensor:
    """
    Returns shares of which none is above `cap`: what is above it goes to the other clients of the row that have a
    share, in proportion. Where `cap` leaves no room for the whole, these have equal shares.

    Args:
        share_Km (`Tensor` of shape `[K, m]`): Each row sums to 1.
        cap (`float`): The most of an expert that a client may be, in (0, 1].
    """
    share_Km = share_Km.clone()
    full_Km = torch.zeros_like(share_Km, dtype=torch.bool)
    for _ in range(share_Km.shape[1]):
        above_Km = (share_Km > cap) & ~full_Km
        if not above_Km.any():
            break
        full_Km |= above_Km
        left_K1 = 1 - cap * full_Km.sum(1, keepdim=True)
        open_Km = share_Km.masked_fill(full_Km, 0.0)
        spread_Km = open_Km * (left_K1 / open_Km.sum(1, keepdim=True).clamp_min(torch.finfo(open_Km.dtype).tiny))
        share_Km = torch.where(full_Km, cap, spread_Km)
    some_Km = (share_Km > 0).to(share_Km)
    return torch.where(share_Km.sum(1, keepdim=True) < 1 - 1e-4, some_Km / some_Km.sum(1, keepdim=True), share_Km)
