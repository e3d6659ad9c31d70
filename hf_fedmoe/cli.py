"""The command line: `hf-fedmoe compare FILE`."""

import argparse
import signal
import sys
from typing import Any, NoReturn

from . import __version__


# `.experiments` is imported when it is needed: torch comes with it, and a mistyped word would take seconds.


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
    command = commands.add_parser(
        "compare",
        allow_abbrev=False,
        help="methods side by side over seeds, from one YAML",
        description="Runs every method of a YAML on every seed, with equal clients, initial weights and local steps. "
        "Finished runs are kept, one that was stopped goes on. Any setting can follow: --rounds 5.",
    )
    command.add_argument("file", help="the YAML; recipes/paper has examples")
    command.add_argument("--size", help="one of the YAML's sizes (the first)")
    command.add_argument("--seeds", type=int, nargs="+", help="in the place of the YAML's")
    command.add_argument("--rows", nargs="+", help="only these rows of the table")
    command.add_argument("--jobs", type=int, default=1, help="runs side by side (1)")
    command.add_argument("--out", help="folder of the runs and tables (runs/compare/NAME)")
    options, words = parser.parse_known_args(argv)
    _compare(command, options, words)


def _compare(parser: _Parser, options: argparse.Namespace, words: list[str]) -> None:
    from .experiments import FailedRunsError, compare, read_words

    # The runs' processes are stopped on the way out.
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        told: dict[str, Any] = read_words(words)
        print("\n" + compare(options.file, options.out, options.size, options.seeds, options.rows, options.jobs, told))
    except (ValueError, OSError, ImportError) as error:
        parser.exit(2, f"hf-fedmoe: {' '.join(str(error).split())}\n")
    except FailedRunsError as error:
        print(f"\n{error.table}")
        sys.exit(1)
    except KeyboardInterrupt:
        parser.exit(130, "hf-fedmoe: stopped; the same command goes on from the last checkpoints.\n")
    finally:
        signal.signal(signal.SIGTERM, before)


def _exit(signum: int, frame: Any) -> NoReturn:
    sys.exit(128 + signum)


if __name__ == "__main__":
    main()
