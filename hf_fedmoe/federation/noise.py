"""Gaussian noise of differential privacy."""

import os
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .randomness import Stream, seed_of


# From a number of elements to as many draws of N(0, 1), in float64.
Normals = Callable[[int], Tensor]


def system_normals(round_index: int) -> Normals:
    """Gives noise of the operating system's entropy: a cryptographic generator's, which no seed gives again."""

    def draw(count: int) -> Tensor:
        bits = np.frombuffer(os.urandom(8 * count), np.uint64)
        # 52 bits and a half: with a bit more the largest would be rounded to 1, whose quantile is infinite.
        return torch.special.ndtri(torch.from_numpy(((bits >> 12) + 0.5) * 2.0**-52))

    return draw


def seeded_normals(seed: int) -> Callable[[int], Normals]:
    """Gives noise that follows from a seed and the round: whoever knows the seed can take it away again."""

    def of_round(round_index: int) -> Normals:
        generator = torch.Generator().manual_seed(seed_of(seed, Stream.NOISE, round_index))
        return lambda count: torch.randn(count, generator=generator, dtype=torch.float64)

    return of_round
