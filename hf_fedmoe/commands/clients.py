"""Arguments that say where clients' own files or folders are, and what is in them."""

import argparse
from typing import Any


# The arguments that tell clients, by the names of `train_own`'s settings.
SETTINGS = ("clients", "text_column", "label_column", "classes", "model")


def add_clients(command: argparse.ArgumentParser) -> None:
    """Adds the arguments to a command."""
    command.add_argument("--clients", nargs="+", metavar="FILE", help="a file of each client; NAME=FILE names one")
    command.add_argument("--images", nargs="+", metavar="FOLDER", help="or a folder of each, a subfolder a class")
    command.add_argument("--text_column", metavar="NAME", help="the files' column of texts")
    command.add_argument("--label_column", metavar="NAME", help="the files' column of labels: words or whole numbers")
    command.add_argument("--classes", nargs="+", metavar="NAME", help="all classes in order (those that occur)")
    command.add_argument("--model", help="start: a folder, a Hub id, or a name (gpt2-reviews; for images small_cnn)")


def told_clients(parser: argparse.ArgumentParser, options: argparse.Namespace) -> dict[str, Any]:
    """Returns what was said of clients, without what was left out; ends the command unless they are there once."""
    if (options.clients is None) == (options.images is None):
        parser.error("give either --clients, a file of each client, or --images, a folder of each")
    told = {name: vars(options)[name] for name in SETTINGS}
    told["clients"] = options.clients or options.images
    return {name: value for name, value in told.items() if value is not None}
