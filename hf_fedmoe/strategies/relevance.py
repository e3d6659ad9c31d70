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
