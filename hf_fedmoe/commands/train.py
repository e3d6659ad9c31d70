"""`hf-fedmoe train`: from clients' own files, or folders of images, to a model."""

import argparse
from typing import Any

from .clients import add_clients, told_clients
from .one_line import announce_loading, in_one_line, quietly


# Settings that the parser knows besides those of the clients.
SETTINGS = ("reserved", "test", "validation", "rounds", "output_dir")


def add(commands: "argparse._SubParsersAction[Any]") -> None:
    """Adds the command."""
    train = commands.add_parser(
        "train",
        allow_abbrev=False,
        help="a model from clients' own files or folders of images",
        description="Trains a model from clients' own files, or folders of images, in rounds that this machine plays. "
        "Files are .csv, .jsonl, .json or .parquet and name their columns alike. What the result is worth is printed "
        "beside the most frequent class and a control. Any training argument can follow, and settings of the data: "
        "--learning_rate 1e-4 --num_train_epochs 2 --seed 1, --max_length 128 of texts (64), --image_size 64 of "
        "images (32).",
    )
    add_clients(train)
    train.add_argument("--method", default="fedmoe", help="fedmoe, fedavg, fedprox, ... (fedmoe)")
    train.add_argument("--lora", action="store_true", help="clients train and send LoRA adapters only")
    train.add_argument("--reserved", metavar="FILE|SHARE", help="labelled rows of the server, or their share (0.1)")
    train.add_argument("--test", metavar="FILE|SHARE", help="rows of the test, or their share (0.2)")
    train.add_argument("--validation", metavar="FILE|SHARE", help="rows that rounds are scored on, or their share (0)")
    train.add_argument("--control", metavar="METHOD", help="a method to compare with, or none (fair FedAvg, if cheap)")
    train.add_argument("--rounds", help="rounds of the federation (10)")
    train.add_argument("--output_dir", metavar="FOLDER", help="of the model, its card and the figures (runs/own)")
    train.set_defaults(run=run, parser=train)


def run(parser: argparse.ArgumentParser, options: argparse.Namespace, words: list[str]) -> None:
    """Runs the command."""
    told = told_clients(parser, options)
    told |= {name: vars(options)[name] for name in SETTINGS if vars(options)[name] is not None}
    if options.lora:
        told["peft"] = "lora"
    announce_loading()
    with in_one_line(parser, "stopped; the same command goes on from the last checkpoint"):
        from ..experiments import read_words, train_own

        with quietly():
            train_own(told | read_words(words), options.images is not None, options.method, options.control)
