"""Lines of a command: that it loads, its errors and its warnings, without tracebacks and places in files."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ..experiments.library_warnings import without_library_warnings


def refuse(parser: argparse.ArgumentParser, words: list[str]) -> None:
    """Ends a command that was given words which it does not know."""
    if words:
        parser.error(f"unrecognized arguments: {' '.join(words)}")


def announce_loading() -> None:
    """Says on the standard error why nothing comes for some seconds, unless PyTorch is there already."""
    if "torch" not in sys.modules:
        print("Loading PyTorch and transformers ...", file=sys.stderr, flush=True)


@contextmanager
def in_one_line(parser: argparse.ArgumentParser, stopped: str = "stopped") -> Iterator[None]:
    """Ends a command with a line for each fault: exit code 2 where what it was told is wrong, 130 where `stopped`."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        parser.exit(2, f"{parser.prog}: {_said(error)}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"\n{parser.prog}: {stopped}.\n")


def _said(error: Exception) -> str:
    """Returns what an error says: in one line, or where several files are wrong, in one for each fault."""
    several = str(error).splitlines() if type(error) is ValueError else [str(error)]  # libraries' have other lines
    return "\n".join(line for each in several if (line := " ".join(each.split())))


@contextmanager
def quietly() -> Iterator[None]:
    """Shows this package's warnings as notes of one line, those of libraries and their bars for files not at all."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # an unreadable file is an error of ours
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # of loading and saving weights; rounds keep theirs
    try:
        with without_library_warnings():
            yield
    finally:
        logging.set_verbosity(before[0])
        if before[1]:
            logging.enable_progress_bar()
