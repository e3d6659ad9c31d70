"""A base on disk and texts of owners, small enough for tests."""

from pathlib import Path

import numpy as np

from tests.tiny_decoders import tiny_decoder
from tests.tiny_tokenizer import tiny_tokenizer


def text_of(name: str, words: int = 400) -> str:
    """Words of which half are the owner's own."""
    draws = np.random.default_rng(len(name) + 7 * ord(name[0]))
    own = draws.integers(3, 24, 6)
    return " ".join(
        f"w{own[draws.integers(6)] if draws.random() < 0.5 else draws.integers(3, 24)}" for _ in range(words)
    )


def save_base(folder: Path, seed: int = 0) -> Path:
    tiny_decoder("gpt2", seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
