"""Differentially private statistics of a text, by noise on their sums.

Shape suffixes: D width of the embeddings + 1.
"""

import math
import secrets
from collections.abc import Sequence
from statistics import NormalDist

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..models import TextStatistics, text_statistics
from ..models.router_fedmoe_causal import PREFIXES, all_embeddings


def private_statistics(
    base: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    epsilon: float,
    delta: float,
    base_sha256: str | None = None,
    seed: int | None = None,
) -> TextStatistics:
    """
    Sums up a text so that nobody who sees the sums can tell whether a sequence was in it: (epsilon, delta)-
    differentially private for adding or leaving out one sequence, by the Gaussian mechanism. What else an owner gives
    away, the adapter, is not private by this.

    Features are shortened to the median norm of the base's embeddings, which says nothing of the text; noise goes on
    the sum of `x x^T` with features in units of this norm, so that the ones appended to them count alike. What comes
    out is brought back to what a text can have: no eigenvalue below 0.

    Args:
        base (`PreTrainedModel`): Without an adapter in it.
        sequences (`Sequence[Sequence[int]]`): Token ids, from [`pack`].
        epsilon (`float`), delta (`float`): How little can be told, both above 0, delta below 1.
        base_sha256 (`str`, *optional*): As in [`text_statistics`].
        seed (`int`, *optional*): Of the noise. Whoever knows it can take the noise away: drawn by the system, and
            forgotten, if left out.

    Raises:
        `ValueError`: If epsilon or delta is out of its range.
    """
    embed = base.get_input_embeddings()
    longest = all_embeddings(embed).norm(dim=1).median().item()
    exact = text_statistics(embed, sequences, base_sha256=base_sha256, longest=longest)
    # A sequence adds one x x^T of the norm |x|^2 <= 2 for each prefix.
    scale = gaussian_noise(epsilon, delta, 2.0 * len(PREFIXES))
    generator = torch.Generator().manual_seed(secrets.randbits(63) if seed is None else seed)
    noise_DD = torch.randn(exact.gram_DD.shape, generator=generator, dtype=torch.float64) * scale
    # Half of the numbers are each other's mirror: the norm counts both, the noise is drawn once.
    noise_DD = noise_DD.triu(1) / 2**0.5
    noise_DD = noise_DD + noise_DD.T
    noise_DD += torch.diag(torch.randn(len(noise_DD), generator=generator, dtype=torch.float64) * scale)
    units_D = torch.full((len(noise_DD),), longest, dtype=torch.float64)
    units_D[-1] = 1.0
    noisy_DD = exact.gram_DD / units_D / units_D[:, None] + noise_DD
    return TextStatistics(_possible(noisy_DD, units_D, exact.count), base_sha256)


def _possible(gram_DD: Tensor, units_D: Tensor, most: int) -> Tensor:
    """Brings a noisy sum, in units of the longest feature, back to what a text can have, in units of embeddings."""
    values_D, vectors_DD = torch.linalg.eigh(gram_DD)
    gram_DD = vectors_DD * values_D.clamp_min(0) @ vectors_DD.T
    count = gram_DD[-1, -1].clamp(1, most)
    gram_DD *= count / gram_DD[-1, -1].clamp_min(1)
    # No feature is longer than 1, so that the mean of the squares is not either.
    excess = (gram_DD.diagonal()[:-1].sum() / count).clamp_min(1)
    shrunk_D = torch.full_like(units_D, excess.rsqrt().item())
    shrunk_D[-1] = 1.0
    gram_DD = gram_DD * (shrunk_D * units_D) * (shrunk_D * units_D)[:, None]
    gram_DD[-1, -1] = count
    return gram_DD.triu() + gram_DD.triu(1).T


def gaussian_noise(epsilon: float, delta: float, sensitivity: float) -> float:
    """
    Finds the least standard deviation of Gaussian noise that makes a sum private (Balle and Wang 2018, "Improving the
    Gaussian Mechanism for Differential Privacy", Theorem 8).

    Args:
        epsilon (`float`), delta (`float`): Of the privacy.
        sensitivity (`float`): By how much one sequence changes the sum, in the Euclidean norm.

    Raises:
        `ValueError`: If epsilon or delta is out of its range.
    """
    for name, value, most in (("epsilon", epsilon, math.inf), ("delta", delta, 1.0)):
        if not 0 < value < most:
            raise ValueError(f"`{name}` is {value}: give a number above 0{' and below 1' if most == 1 else ''}.")
    phi = NormalDist().cdf

    def told(deviation: float) -> float:
        """The least delta at this deviation, of a sensitivity of 1."""
        a, b = 1 / (2 * deviation), epsilon * deviation
        return phi(a - b) - math.exp(epsilon) * phi(-a - b)

    low, high = 1e-6, 1.0
    while told(high) > delta:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if told(middle) > delta else (low, middle)
    return high * sensitivity
