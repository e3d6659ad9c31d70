"""`hf-fedmoe compare`: methods side by side over seeds."""

import argparse
import sys
from typing import Any

from .one_line import announce_loading
from .sigterm import ending_with_sigterm


def add(commands: "argparse._SubParsersAction[Any]") -> None:
    """Adds the command."""
    compare = commands.add_parser(
        "compare",
        allow_abbrev=False,
        help="methods side by side over seeds, from one YAML",
        description="Runs every method of a YAML on every seed, with equal clients, initial weights and local steps. "
        "Finished runs are kept, one that was stopped goes on. Any setting can follow: --rounds 5.",
    )
    compare.add_argument(
        "file", help="the YAML, of classifiers or of language models; recipes/paper and recipes/language have examples"
    )
    compare.add_argument("--size", help="one of the YAML's sizes (the first)")
    compare.add_argument("--seeds", type=int, nargs="+", help="in the place of the YAML's")
    compare.add_argument("--rows", nargs="+", help="train only these rows; finished ones stay in the table")
    compare.add_argument("--jobs", type=int, default=1, help="runs side by side (1)")
    compare.add_argument("--out", help="folder of the runs and tables (runs/compare/NAME)")
    compare.add_argument(
        "--plugin", metavar="FILE", help="a Python file with methods of your own, which is run (docs/strategies.md)"
    )
    compare.set_defaults(run=run, parser=compare)


def run(parser: argparse.ArgumentParser, options: argparse.Namespace, words: list[str]) -> None:
    """Runs the command."""
    announce_loading()
    from ..experiments import FailedRunsError, compare, read_words

    try:
        told: dict[str, Any] = read_words(words)
        if options.plugin is not None:
            told["plugin"] = options.plugin
        with ending_with_sigterm():  # which stops the runs' processes
            table = compare(options.file, options.out, options.size, options.seeds, options.rows, options.jobs, told)
        print(f"\n{table}")
    except (ValueError, OSError, ImportError) as error:
        parser.exit(2, f"hf-fedmoe: {' '.join(str(error).split())}\n")
    except FailedRunsError as error:
        print(f"\n{error.table}")
        sys.exit(1)
    except KeyboardInterrupt:
        parser.exit(130, "hf-fedmoe: stopped; the same command goes on from the last checkpoints.\n")
