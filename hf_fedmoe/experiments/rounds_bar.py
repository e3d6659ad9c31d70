"""A bar of the rounds of all runs of a comparison, which are in processes of their own."""

from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm

from ..data.counted import counted
from .noted_rounds import noted_round
from .runs import Run


# Of the runs that the bar names.
MOST_NAMED = 2


class RoundsBar:
    """
    A bar of the rounds of all runs, with the time that is left and what is running. A context manager.

    Args:
        runs (`Iterable[Run]`): Those that are waiting.
    """

    def __init__(self, runs: Iterable[Run]):
        self._rounds = {run.folder: run.parse()[1].rounds if run.trains else 0 for run in runs}
        self._ended = 0

    def __enter__(self) -> "RoundsBar":
        self._bar: Any = tqdm(total=sum(self._rounds.values()), unit="round", dynamic_ncols=True, leave=False)
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.close()

    def try_out(self, busy: list[list[Run]]) -> None:
        """Says that runs are tried out, before the first one trains."""
        self._bar.set_postfix_str(f"trying {counted(sum(map(len, busy)), 'run')} out, data and models")

    def rehearse(self, busy: list[Run]) -> None:
        """Says which runs are rehearsed."""
        self._bar.set_postfix_str(f"rehearsing {'; '.join(run.row for run in busy[:MOST_NAMED])}")

    def say(self, line: str) -> None:
        """Writes a line above the bar."""
        self._bar.write(line)

    def watch(self, busy: list[Run]) -> None:
        """Shows where the running ones are; what has noted no round yet reads its data and makes its model."""
        rounds = [noted_round(run.folder) for run in busy]
        named = [
            f"{run} {'prepares' if done is None else f'{done}/{self._rounds[run.folder]}'}"
            for run, done in zip(busy, rounds, strict=True)
        ]
        self._bar.n = self._ended + sum(done or 0 for done in rounds)
        self._bar.set_postfix_str("; ".join(named[:MOST_NAMED]))

    def end(self, run: Run, line: str) -> None:
        """Counts a run as ended, and writes a line above the bar."""
        self._ended += self._rounds[run.folder]
        self._bar.n = self._ended
        self.say(line)
