"""The command line `hf-fedmoe`, whose commands are in `commands`."""

import argparse
from typing import NoReturn

from . import __version__
from .commands import compare, demo, diagnose, elsewhere, expert, train, use


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; `{self.prog} --help` says more.\n")


def main(argv: list[str] | None = None) -> None:
    """Runs the command `hf-fedmoe`; errors in what it is told end it with a message, not with a traceback."""
    parser = _Parser(
        prog="hf-fedmoe", description="Federated learning with a server-side mixture.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"hf_fedmoe {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train.add(commands)
    use.add(commands)
    demo.add(commands)
    diagnose.add(commands)
    compare.add(commands)
    expert.add(commands)
    elsewhere.add(commands)
    options, words = parser.parse_known_args(argv)
    options.run(options.parser, options, words)


if __name__ == "__main__":
    main()
