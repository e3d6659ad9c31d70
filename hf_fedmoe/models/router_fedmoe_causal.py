"""
Statistics of an owner's text, and the router that follows from sums of them in closed form. Flat: the file travels to
the Hub as it is.

Shape suffixes: B batch, T tokens, V vocabulary, H width of the embeddings, D = H + 1 (a column of ones is last), N
features, E experts (the base first), P = D (D + 1) / 2.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


# After how many tokens the running mean is a feature: owners' texts are met at every length.
PREFIXES = (4, 8, 16, 32, 64, 127)
# Features that are multiplied at once.
_BLOCK = 4096
# The score of an expert that the router does not know: finite, as all that is saved, and without any weight.
UNKNOWN = -1e30
# Features that a text can have, what rounding may change, and how much longer an embedding was in another type.
_MOST, _ROUNDING, _OTHER_TYPE = 2**53, 1e-6, 1.02


@dataclass(frozen=True)
class TextStatistics:
    """
    Sums over an owner's text, of which the router is made: the Gram matrix of its features, each with a one appended,
    in which the number of features and their sum are the last row. Add those of parts to have those of the whole.

    Args:
        gram_DD (`torch.Tensor` of shape `(D, D)`):
            Sum of `x x^T`, in float64.
        base_sha256 (`str`, *optional*):
            From [`base_sha256`], of the model whose embeddings were averaged.
    """

    gram_DD: Tensor
    base_sha256: str | None = None

    def __post_init__(self) -> None:
        gram_DD = self.gram_DD
        if gram_DD.dim() != 2 or gram_DD.shape[0] != gram_DD.shape[1] or gram_DD.dtype != torch.float64:
            raise ValueError(
                f"`gram_DD` has the shape {tuple(gram_DD.shape)} in {gram_DD.dtype}: pass a square matrix in float64."
            )
        if not gram_DD.isfinite().all():
            raise ValueError("`gram_DD` is not finite: look for NaN or infinite values in the embeddings.")

    @property
    def count(self) -> int:
        """Number n of features."""
        return round(self.gram_DD[-1, -1].item())

    @property
    def feature_sum_H(self) -> Tensor:
        """Sum of the features, without the ones."""
        return self.gram_DD[-1, :-1]

    def __add__(self, other: "TextStatistics") -> "TextStatistics":
        """Statistics of both texts together."""
        self._check_same_base(other)
        return TextStatistics(self.gram_DD + other.gram_DD, self.base_sha256 or other.base_sha256)

    def __sub__(self, other: "TextStatistics") -> "TextStatistics":
        """Statistics of this text without the part `other`."""
        self._check_same_base(other)
        return TextStatistics(self.gram_DD - other.gram_DD, self.base_sha256 or other.base_sha256)

    def _check_same_base(self, other: "TextStatistics") -> None:
        if self.gram_DD.shape != other.gram_DD.shape or (
            self.base_sha256 and other.base_sha256 and self.base_sha256 != other.base_sha256
        ):
            raise ValueError(
                f"The statistics are of two bases, {len(self.gram_DD) - 1} wide with `base_sha256` "
                f"{self.base_sha256!r} and {len(other.gram_DD) - 1} wide with {other.base_sha256!r}: take both with "
                "the embeddings of one base."
            )

    def fault(self, embed: torch.nn.Module) -> str | None:
        """
        Says why these cannot be sums over a text, `None` if they can. Whoever puts owners together asks: sums that no
        text has would have the router send everything to one of them.

        Args:
            embed (`nn.Module`): The base's token embeddings, of which features are means and so no longer than the
                longest.
        """
        embeddings_VH = all_embeddings(embed)
        gram_DD, count = self.gram_DD, self.gram_DD[-1, -1].item()
        if len(gram_DD) != embeddings_VH.shape[1] + 1:
            return f"they are of embeddings {len(gram_DD) - 1} wide, the base's are {embeddings_VH.shape[1]} wide"
        if not gram_DD.equal(gram_DD.T):
            return "they are not symmetric"
        if not 0.5 < count < _MOST:
            return f"they are over {count:.3g} features"
        longest = embeddings_VH.square().sum(1).max().item()
        mean = gram_DD.diagonal()[:-1].sum().item() / count
        if not mean <= longest * _OTHER_TYPE:
            return (
                f"the mean square of a feature is {mean:.3g}, and no embedding of the base has more than {longest:.3g}"
            )
        lowest, highest = torch.linalg.eigvalsh(gram_DD)[[0, -1]].tolist()
        if lowest < -_ROUNDING * highest:
            return f"they are no sum of squares, with the eigenvalue {lowest:.3g} beside {highest:.3g}"
        return None

    def save(self, path: str | os.PathLike) -> None:
        """
        Writes the statistics as safetensors.

        Args:
            path (`str` or `os.PathLike`): The file.
        """
        metadata = {"base_sha256": self.base_sha256} if self.base_sha256 else None
        save_file({"gram": self.gram_DD.contiguous()}, path, metadata=metadata)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        """
        Reads what [`~TextStatistics.save`] has written.

        Args:
            path (`str` or `os.PathLike`): The file.

        Raises:
            `ValueError`: If the file holds something else.
        """
        with safe_open(path, "pt") as file:
            if "gram" not in file.keys():  # noqa: SIM118  (no dict)
                raise ValueError(f"{str(path)!r} holds {list(file.keys())} and no statistics: pass a file of `save`.")
            return cls(file.get_tensor("gram"), (file.metadata() or {}).get("base_sha256"))


@torch.no_grad()
def all_embeddings(embed: torch.nn.Module) -> Tensor:
    """Computes the embedding of each token, `(V, H)` in float64: some bases scale what they store."""
    weight = embed.weight
    assert isinstance(weight, Tensor)
    return embed(torch.arange(len(weight), device=weight.device)).double().cpu()


@torch.no_grad()
def text_statistics(
    embed: Callable[[Tensor], Tensor],
    sequences: Iterable[Sequence[int] | Tensor],
    prefixes: Sequence[int] = PREFIXES,
    base_sha256: str | None = None,
    longest: float | None = None,
) -> TextStatistics:
    """
    Sums up an owner's text. A feature is the mean of the embeddings of the first 4, 8, 16, ... tokens of a sequence.

    Args:
        embed (`Callable`):
            The base's token embeddings, `model.get_input_embeddings()`.
        sequences (`Iterable[Sequence[int] | torch.Tensor]`):
            The token ids of each text, without padding.
        prefixes (`Sequence[int]`, *optional*, defaults to `(4, 8, 16, 32, 64, 127)`):
            Numbers of tokens; a sequence has as many features as it has prefixes of these lengths.
        base_sha256 (`str`, *optional*):
            From [`base_sha256`], to be compared where the statistics are used.
        longest (`float`, *optional*):
            Norm to which longer features are shortened. As long as they are if left out.

    Returns:
        [`TextStatistics`]

    Raises:
        `ValueError`: If no sequence has a feature.
    """
    counts_N = torch.tensor(sorted(prefixes))
    device = (
        next((weight.device for weight in embed.parameters()), None) if isinstance(embed, torch.nn.Module) else None
    )
    gram_DD, waiting = None, []
    for sequence in sequences:
        ids_T = torch.as_tensor(sequence, device=device)[: counts_N[-1]]
        if ids_T.dim() != 1:
            raise ValueError(
                f"A sequence has the shape {tuple(ids_T.shape)}: pass the token ids of one text at a time."
            )
        own_N = counts_N[counts_N <= len(ids_T)].to(ids_T.device)
        if len(own_N) == 0:
            continue
        sums_TH = running_sums(embed(ids_T).double(), 0)
        features_NH = sums_TH[own_N - 1] / own_N[:, None]
        if longest is not None:
            features_NH = features_NH * (longest / features_NH.norm(dim=1, keepdim=True)).clamp_max(1)
        waiting.append(torch.nn.functional.pad(features_NH, (0, 1), value=1.0))
        if len(waiting) * len(counts_N) >= _BLOCK:
            gram_DD, waiting = _add_gram(gram_DD, waiting), []
    if waiting:
        gram_DD = _add_gram(gram_DD, waiting)
    if gram_DD is None:
        raise ValueError(f"`sequences` has no text of at least {counts_N[0]} tokens: pass longer ones.")
    # What a product of matrices rounds to need not be symmetric.
    return TextStatistics((gram_DD.triu() + gram_DD.triu(1).T).cpu(), base_sha256)


def _add_gram(gram_DD: Tensor | None, features: list[Tensor]) -> Tensor:
    features_ND = torch.cat(features)
    own_DD = features_ND.T @ features_ND
    return own_DD if gram_DD is None else gram_DD + own_DD


def ridge_router(statistics: Sequence[TextStatistics], ridge: float = 0.01) -> Tensor:
    """
    Finds the linear map from a feature to a score for each class that comes closest to 1 for the own class and 0 for
    the others, by ridge regression from sums alone. Each class counts as one, however much text its sums are over:
    where they counted by their text, owners of little would lose theirs to owners of much. Sums are added in the order
    in which they are given.

    Args:
        statistics (`Sequence[TextStatistics]`):
            The sums of each class.
        ridge (`float`, *optional*, defaults to 0.01):
            The penalty, in units of the mean diagonal of the Gram matrix.

    Returns:
        `torch.Tensor` of shape `(len(statistics), D)`: the map in float64, its bias last.

    Raises:
        `ValueError`: If the sums of a class are over nothing.
    """
    total_DD, means = torch.zeros_like(statistics[0].gram_DD), []
    for place, each in enumerate(statistics):
        if each.count < 1:
            raise ValueError(f"`statistics[{place}].count` is {each.count}: pass sums over some text.")
        mean_DD = each.gram_DD / each.gram_DD[-1, -1]
        total_DD += mean_DD
        means.append(mean_DD[-1])
    total_DD.diagonal().add_(ridge * total_DD.diagonal().mean())
    return torch.linalg.solve(total_DD, torch.stack(means, dim=1)).T


def packed_bits(gram_DD: Tensor) -> Tensor:
    """Half of a symmetric matrix in float64 as the bits of integers, `(P,)`: no cast of a model changes them."""
    upper_DD = torch.ones_like(gram_DD, dtype=torch.bool).triu()
    return gram_DD[upper_DD].view(torch.int64)


def unpacked_bits(bits_P: Tensor) -> Tensor:
    """The symmetric matrix that [`packed_bits`] was given, `(D, D)`."""
    size = int(((8 * len(bits_P) + 1) ** 0.5 - 1) / 2)
    gram_DD = torch.zeros(size, size, dtype=torch.float64, device=bits_P.device)
    gram_DD[torch.ones_like(gram_DD, dtype=torch.bool).triu()] = bits_P.view(torch.float64)
    return gram_DD + gram_DD.triu(1).T


def running_sums(values: Tensor, dim: int) -> Tensor:
    """
    Sums up to and including each position.

    Args:
        values (`torch.Tensor`): The values.
        dim (`int`): The dimension along which they are summed.
    """
    if values.is_cuda and torch.are_deterministic_algorithms_enabled():  # where a GPU refuses
        return values.cpu().cumsum(dim).to(values.device)
    return values.cumsum(dim)


def running_means(
    values_BTE: Tensor, attention_mask_BT: Tensor | None = None, position_ids_BT: Tensor | None = None
) -> Tensor:
    """
    Means of each row up to and including each position.

    Args:
        values_BTE (`torch.Tensor` of shape `(B, T, E)`):
            The rows.
        attention_mask_BT (`torch.Tensor` of shape `(B, T)`, *optional*):
            0 at padding, which does not count.
        position_ids_BT (`torch.Tensor` of shape `(B, T)`, *optional*):
            Where these are 0 a sequence begins, in rows that hold several, and with it the mean.

    Returns:
        `torch.Tensor` of shape `(B, T, E)`; zeros before the first token.
    """
    counted_BT1 = torch.ones_like(values_BTE[..., :1])
    if attention_mask_BT is not None:
        counted_BT1 = attention_mask_BT.to(values_BTE)[..., None]
    # A column for the counts, so that both are summed and begin anew alike.
    sums = running_sums(torch.cat([values_BTE * counted_BT1, counted_BT1], dim=-1), 1)
    if position_ids_BT is not None:
        places_T = torch.arange(sums.shape[1], device=sums.device)
        first_BT = (places_T * (position_ids_BT == 0)).cummax(dim=1).values
        before = torch.nn.functional.pad(sums, (0, 0, 1, 0))[:, :-1]
        sums = sums - before.gather(1, first_BT[..., None].expand(sums.shape))
    return sums[..., :-1] / sums[..., -1:].clamp_min(1)


def expert_weights_of(scores_BTE: Tensor, temperature: float, top_l: int | None = None) -> Tensor:
    """
    Turns scores into weights that sum to 1.

    Args:
        scores_BTE (`torch.Tensor` of shape `(B, T, E)`):
            Scores, [`UNKNOWN`] for experts without a weight.
        temperature (`float`):
            The weights are `softmax(scores / temperature)`.
        top_l (`int`, *optional*):
            How many of them stay, renormalised. All if left out.

    Returns:
        `torch.Tensor` of shape `(B, T, E)`
    """
    weights_BTE = (scores_BTE / temperature).softmax(dim=-1)
    if top_l is None or top_l >= weights_BTE.shape[-1]:
        return weights_BTE
    chosen_BTL, experts_BTL = weights_BTE.topk(top_l, dim=-1)
    chosen_BTL = chosen_BTL / chosen_BTL.sum(dim=-1, keepdim=True)
    return torch.zeros_like(weights_BTE).scatter(-1, experts_BTL, chosen_BTL)
