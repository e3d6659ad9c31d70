"""`hf-fedmoe train`: from clients' own files, or folders of images, to a model."""

import argparse
from typing import Any

from .one_line import in_one_line, quietly


# What the parser knows besides the settings that `train_own` is told.
NOT_SETTINGS = {"command", "run", "parser", "images", "lora", "method", "control"}


def add(commands: "argparse._SubParsersAction[Any]") -> None:
    """Adds the command."""
    train = commands.add_parser(
        "train",
        allow_abbrev=False,
        help="a model from clients' own files or folders of images",
        description="Trains a model from clients' own files, or folders of images, in rounds that this machine plays. "
        "Files are .csv, .jsonl, .json or .parquet and name their columns alike. What the result is worth is printed "
        "beside the most frequent class and a control. Any training argument can follow: --learning_rate 1e-4 "
        "--num_train_epochs 2.",
    )
    train.add_argument("--clients", nargs="+", metavar="FILE", help="a file of each client; NAME=FILE names one")
    train.add_argument("--images", nargs="+", metavar="FOLDER", help="or a folder of each, a subfolder a class")
    train.add_argument("--text_column", metavar="NAME", help="the files' column of texts")
    train.add_argument("--label_column", metavar="NAME", help="the files' column of labels: words or whole numbers")
    train.add_argument("--classes", nargs="+", metavar="NAME", help="all classes in order (those that occur)")
    train.add_argument("--model", help="start: a folder, a Hub id, or a name (gpt2-reviews; for images small_cnn)")
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
    if (options.clients is None) == (options.images is None):
        parser.error("give either --clients, a file of each client, or --images, a folder of each")
    print("Loading PyTorch and transformers ...", flush=True)
    with in_one_line(parser, "stopped; the same command goes on from the last checkpoint"):
        from ..experiments import read_words, train_own

        told = {name: value for name, value in vars(options).items() if value is not None and name not in NOT_SETTINGS}
        if options.images is not None:
            told["clients"] = options.images
        if options.lora:
            told["peft"] = "lora"
        with quietly():
            train_own(told | read_words(words), options.images is not None, options.method, options.control)
