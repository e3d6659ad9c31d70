"""
The recipes' paper presets with models, clients and server of the paper's size, and rows that are made up: random
words, pixels and letters. Clients have fewer rows, so that a round takes a minute of a GPU at most.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, BertConfig, BertModel, GPT2Config, GPT2Model, PreTrainedModel


RECIPES = Path(__file__).parents[2] / "recipes"
# Longer than the 64 tokens that are read of it.
WORDS_OF_A_TEXT = 70


@dataclass
class PaperSize:
    """
    A recipe's paper preset on rows that are made up.

    Args:
        rows (`Callable`): Writes them into a folder and returns the name of their file.
        settings (`dict[str, str]`): In the place of the preset's: where rows are, and how many.
        models (`dict[str, PreTrainedModel]`, *optional*): Makers of the models that the Hub has, by the setting that
            names them.
        small (`dict[str, str]`, *optional*): Further settings, for a CPU.
    """

    rows: Callable[[Path], str]
    settings: dict[str, str]
    models: dict[str, Callable[[bool], PreTrainedModel]]
    small: dict[str, str]


def texts(labels: list[int], count: int) -> Callable[[Path], str]:
    """Makes rows of random words, as many of each class."""

    def write(folder: Path) -> str:
        rng, file = np.random.default_rng(0), folder / "texts.parquet"
        words = rng.choice(sorted(AutoTokenizer.from_pretrained(str(tokenizer())).get_vocab()), 500)
        words = [word for word in words if word.isalpha()]
        rows = [" ".join(rng.choice(words, WORDS_OF_A_TEXT)) for _ in range(count)]
        found = {"text": rows, "label": [labels[row % len(labels)] for row in range(count)]}
        datasets.Dataset.from_dict(found).to_parquet(file)
        return str(file)

    return write


def images(size: int, mode: str, classes: int, count: int, writers: int, label: str) -> Callable[[Path], str]:
    """Makes rows of random pixels, each of a class and a writer."""

    def write(folder: Path) -> str:
        rng, file = np.random.default_rng(0), folder / "images.parquet"
        shape = (size, size, 3) if mode == "RGB" else (size, size)
        rows = {
            "image": [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for _ in range(count)],
            label: [row % classes for row in range(count)],
            "writer_id": [f"writer {row // classes % writers}" for row in range(count)],
        }
        features = {"image": datasets.Image(), label: datasets.ClassLabel(classes)}
        features["writer_id"] = datasets.Value("string")
        datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(file)
        return str(file)

    return write


def plays(roles: int, lines: int) -> Callable[[Path], str]:
    """Makes what roles say, of random letters."""

    def write(folder: Path) -> str:
        rng, file = np.random.default_rng(0), folder / "plays.parquet"
        letters = np.array(list("abcdefghij klmnopqrstuvwxyz,.!?"))
        rows = {
            "text": ["".join(rng.choice(letters, 60)) for _ in range(roles * lines)],
            "role_id": [f"role {row % roles}" for row in range(roles * lines)],
        }
        datasets.Dataset.from_dict(rows).to_parquet(file)
        return str(file)

    return write


def tokenizer() -> Path:
    return Path(str(files("hf_fedmoe") / "assets" / "gpt2-reviews"))


def gpt2(layers: int, hidden: int, heads: int) -> Callable[[bool], PreTrainedModel]:
    """Makes a GPT-2 of random weights."""

    def make(small: bool) -> PreTrainedModel:
        shape = dict(n_layer=1, n_embd=16, n_head=2) if small else dict(n_layer=layers, n_embd=hidden, n_head=heads)
        return GPT2Model(GPT2Config(vocab_size=4096 if small else 50257, bos_token_id=0, eos_token_id=0, **shape))

    return make


def bert(small: bool) -> PreTrainedModel:
    """Makes a BERT of random weights."""
    shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32) if small else {}
    return BertModel(BertConfig(vocab_size=4096 if small else 30522, **shape))


TINY_RESNET = '{"embedding_size": 4, "hidden_sizes": [4, 6], "depths": [1, 1]}'
TINY_CNN = '{"channels": [2, 3], "hidden_size": 8}'
SIZES = {
    "yelp_gpt2": PaperSize(
        texts([0, 1, 2, 3, 4], 15_000),
        {"examples_per_client": "40", "max_test_examples": "1000"},
        {"model": gpt2(24, 1024, 16), "gate": gpt2(12, 768, 12)},
        {"examples_per_client": "8"},
    ),
    "sent140_bert": PaperSize(
        texts([0, 1], 25_000),
        {"max_test_examples": "1000"},
        {"model": bert, "gate": bert},
        {"examples_per_client": "8"},
    ),
    "cifar10_resnet18": PaperSize(
        images(32, "RGB", 10, 15_000, 1, "label"), {"max_test_examples": "2000"}, {}, {"model_config": TINY_RESNET}
    ),
    "femnist_cnn": PaperSize(
        images(28, "L", 62, 24_800, 80, "character"), {"max_test_examples": "2000"}, {}, {"model_config": TINY_CNN}
    ),
    "shakespeare_lstm": PaperSize(
        plays(800, 10),
        {"stride": "4", "max_test_examples": "2000"},
        {},
        {"model_config": '{"hidden_size": 8}', "num_clients": "20"},
    ),
}
# A tenth of the server's rows will do where nothing but its working is looked at.
SMALL = {"use_cpu": "true", "bf16": "false", "num_clients": "8", "reserved_size": "130", "validation_size": "100"}
SMALL |= {
    "max_test_examples": "100",
    "num_train_epochs": "1",
    "server_iterations": "1",
    "per_device_train_batch_size": "32",
}


def run_paper_size(recipe: str, folder: Path, small: bool = False, rounds: int = 1) -> str:
    """
    Runs a recipe's paper preset in a process of its own; returns what it printed.

    Args:
        recipe (`str`): Its name.
        folder (`Path`): Where rows, models and results go.
        small (`bool`, *optional*, defaults to `False`): Whether with tiny models, on a CPU.
        rounds (`int`, *optional*, defaults to 1): Of the run.
    """
    size = SIZES[recipe]
    settings = {"rounds": str(rounds), "eval_steps": "1", "output_dir": str(folder / "run"), "disable_tqdm": "true"}
    settings |= {"dataset": size.rows(folder), **size.settings}
    torch.manual_seed(0)
    for setting, make in size.models.items():
        path = folder / setting
        make(small).save_pretrained(path)
        AutoTokenizer.from_pretrained(str(tokenizer())).save_pretrained(path)
        settings[setting] = str(path)
    if small:
        settings |= SMALL | size.small
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    command = [sys.executable, str(RECIPES / f"{recipe}.py"), "--preset", "paper", *words]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    return ended.stdout
