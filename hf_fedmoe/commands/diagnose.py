"""`hf-fedmoe diagnose`: in what clients differ, and which methods that suggests, before anything is trained."""

import argparse
from typing import Any

from .clients import add_clients, told_clients
from .one_line import announce_loading, in_one_line, quietly, refuse


def add(commands: "argparse._SubParsersAction[Any]") -> None:
    """Adds the command."""
    diagnose = commands.add_parser(
        "diagnose",
        allow_abbrev=False,
        help="in what clients differ, and which methods that suggests",
        description="Tells from one pass of a model over some rows of each client how much their proportions of "
        "classes differ, and whether classes look different in groups of clients. Nothing is trained.",
    )
    add_clients(diagnose)
    diagnose.add_argument("--seed", type=int, default=42, help="of weights that a start does not have (42)")
    diagnose.set_defaults(run=run, parser=diagnose)


def run(parser: argparse.ArgumentParser, options: argparse.Namespace, words: list[str]) -> None:
    """Runs the command."""
    refuse(parser, words)
    told = told_clients(parser, options)
    announce_loading()
    with in_one_line(parser):
        from ..experiments import diagnose_own

        with quietly():
            print(f"\n{diagnose_own(told | {'seed': options.seed}, options.images is not None)}")
