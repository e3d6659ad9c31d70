"""One seed for everything: each draw has a stream of its own, named by what it is for.

No generator lives longer than one client's round, so a resumed run needs no random state: the round's number is
enough, and which process trains a client does not matter.
"""

import secrets
from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """The purposes of seeds."""

    CLIENT_DRAW = 0
    LOCAL_TRAINING = 1
    SERVER = 2
    ADAPTER_START = 3
    CLIENT_EVALUATION = 4
    PROCESS = 5
    BATCH = 6
    NOISE = 7


def seed_of(seed: int, stream: Stream, *where: int) -> int:
    """A 63-bit seed that follows from the run's seed, the stream and a place in it (round, client)."""
    words = np.random.SeedSequence(seed, spawn_key=(int(stream), *where)).generate_state(2)
    return int(words[0]) << 31 | int(words[1]) >> 1


def fresh_seed() -> int:
    """A seed that follows from nothing: 128 bits of the operating system's entropy."""
    return secrets.randbits(128)
