"""
Statistics of clients' data in the features of a frozen model.

They are sums over rows, so that those of several clients together are those of their rows together, and a client's can
be subtracted again.

Shape suffixes: K groups, C classes, d features, N rows or classes of groups, B rows of a batch.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers import PreTrainedModel

from ..federation import LocalTrainer
from ..models import classification_head
from ..models.classification_head import last_token
from .narrowing import as_whole


# The log likelihood of what does not occur: finite, also in half precision.
NEVER = -1e4


@dataclass
class ClientStatistics:
    """
    Sums over rows of a client, or of several.

    Args:
        count_C (`Tensor` of shape `[C]`): Rows of each class.
        sum_Cd (`Tensor` of shape `[C, d]`): The sum of their features.
        gram_dd (`Tensor` of shape `[d, d]`): The sum over all rows of features times features.
    """

    count_C: Tensor
    sum_Cd: Tensor
    gram_dd: Tensor

    @classmethod
    def of(cls, features_Nd: Tensor, labels_N: Tensor, num_labels: int) -> "ClientStatistics":
        """Returns the statistics of rows."""
        features_Nd = features_Nd.double()
        member_NC = nn.functional.one_hot(labels_N, num_labels).to(features_Nd)
        return cls(member_NC.sum(0), member_NC.T @ features_Nd, features_Nd.T @ features_Nd)

    def __add__(self, other: "ClientStatistics") -> "ClientStatistics":
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return ClientStatistics(*(mine + theirs for mine, theirs in pairs))

    def __sub__(self, other: "ClientStatistics") -> "ClientStatistics":
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return ClientStatistics(*(mine - theirs for mine, theirs in pairs))

    def fault(self, num_examples: int) -> str | None:
        """Says why these cannot be sums over so many rows, `None` if they can."""
        count_C, gram_dd = self.count_C, self.gram_dd
        if (count_C < 0).any() or (count_C != count_C.round()).any() or count_C.sum() != num_examples:
            return f"its statistics are of {count_C.tolist()} rows by class, where there are {num_examples}"
        # Rounding leaves directions in which nothing varies a little below 0.
        slack = 1e-6 * gram_dd.diagonal().abs().max()
        if gram_dd.diagonal().max() > (most := torch.finfo(torch.float32).max):  # in which the server keeps scatters
            return f"its statistics hold {gram_dd.diagonal().max():.3g}, too much to compute with: above {most:.3g}"
        if (gram_dd - gram_dd.T).abs().max() > slack or torch.linalg.eigvalsh(self.scatter())[0] < -slack:
            return "its statistics have a variance below 0, as no rows have"
        return None

    def scatter(self) -> Tensor:
        """Returns the sum `[d, d]` over rows of squared deviations from the mean of the row's class."""
        return self.gram_dd - self.sum_Cd.T @ (self.sum_Cd / self.count_C.clamp_min(1)[:, None])

    def within_covariance(self) -> Tensor:
        """Returns the covariance `[d, d]` of features around the means of their classes."""
        return self.scatter() / self.count_C.sum()


def head_of(model: PreTrainedModel) -> nn.Linear:
    """Returns the linear layer that gives the class scores; raises `ValueError` if there is none."""
    name = classification_head(model)
    if name is None:
        raise ValueError(
            f"Statistics are of what a classification head reads, but {type(model).__name__} has no linear layer with "
            f"`num_labels` = {model.config.num_labels} outputs: take a model that ends in one."
        )
    head = model.get_submodule(name)
    assert isinstance(head, nn.Linear)
    return head


@torch.no_grad()
def head_features(model: nn.Module, head: nn.Linear, batch: dict[str, Tensor], size: int) -> Tensor:
    """
    Returns what a model's classification head reads of a batch `[B, d]`, for a decoder at the last token that is no
    padding; of more than `size` features that many random projections, which are the same everywhere.
    """
    read: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    try:
        model(**batch)
    finally:
        hook.remove()
    if not read:
        raise ValueError(
            f"Statistics are of what the head of one classifier reads, which a {type(model).__name__} does not run by "
            "itself: give the classifier that clients train."
        )
    features = read[0].float()
    if features.dim() == 3:
        features = last_token(features, batch.get("input_ids"), as_whole(model).config.pad_token_id)
    return features @ projection(features.shape[1], size).to(features)


@cache
def projection(num_features: int, size: int) -> Tensor:
    """Draws orthonormal directions `[H, d]`, the same everywhere; of no more than `size` features gives all."""
    if num_features <= size:
        return torch.eye(num_features)
    generator = torch.Generator().manual_seed(size)
    return torch.linalg.qr(torch.randn(num_features, size, generator=generator)).Q


def statistics_of(
    model: nn.Module, head: nn.Linear, batches: Iterable[dict[str, Tensor]], size: int
) -> ClientStatistics:
    """Returns the statistics of batches in the features of a model as it is."""
    features, labels = [], []
    for batch in batches:
        labels.append(batch["labels"])
        features.append(head_features(model, head, batch, size))
    return ClientStatistics.of(torch.cat(features), torch.cat(labels), head.out_features)


def client_statistics(local: LocalTrainer, dataset: Subset, seed: int, size: int) -> ClientStatistics:
    """Returns those of a client's examples in the features of the worker, as it is loaded."""
    local.worker.eval()
    head = head_of(as_whole(local.worker))
    with local.accelerator.autocast():
        return statistics_of(local.worker, head, local.in_order(dataset, seed), size)


def covariance_factor(covariance_dd: Tensor) -> Tensor:
    """Returns the Cholesky factor of a covariance; raises `ValueError` if nothing varies."""
    # A little of each feature's own variance keeps directions in which nothing varies from counting without end.
    variance_d = covariance_dd.diagonal()
    if not 0 < variance_d.max() < torch.inf:
        raise ValueError(
            f"Features of the model vary by {variance_d.max().item():.3g} within classes, so that nothing can be told "
            "of them: take a model whose features depend on its input, and are finite, and clients that together have "
            "two rows or more of a class."
        )
    return torch.linalg.cholesky(covariance_dd + (1e-3 * variance_d + 1e-9 * variance_d.max()).diag())


def prototype_scores(count_KC: Tensor, sum_KCd: Tensor, gram_dd: Tensor) -> tuple[Tensor, Tensor]:
    """
    Finds by linear discriminant analysis how likely features are to be of each class of each group.

    Args:
        count_KC (`Tensor` of shape `[K, C]`): Rows of each class in each group.
        sum_KCd (`Tensor` of shape `[K, C, d]`): The sum of their features.
        gram_dd (`Tensor` of shape `[d, d]`): The sum over all rows of features times features.

    Returns:
        Weights `[K * C, d]` and biases `[K * C]` of the log likelihoods, but for what all have in common. What no row
        is of is not chosen.
    """
    count_N, sum_Nd = count_KC.flatten(), sum_KCd.flatten(0, 1)
    factor_dd = covariance_factor(ClientStatistics(count_N, sum_Nd, gram_dd).within_covariance())
    mean_d = sum_Nd.sum(0) / count_N.sum()
    away_Nd = (sum_Nd / count_N.clamp_min(1)[:, None] - mean_d) * (count_N > 0)[:, None]
    weights_Nd = torch.cholesky_solve(away_Nd.T, factor_dd).T
    bias_N = -weights_Nd @ mean_d - (weights_Nd * away_Nd).sum(1) / 2 + (count_N / count_N.sum()).log()
    return weights_Nd, bias_N.clamp_min(NEVER)
