"""Rounds that runs in processes of their own have behind them, noted in a file of each run's folder."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


NOTE = "round.txt"


class NotesRounds(TrainerCallback):
    """
    Notes the rounds that a run has behind it.

    Args:
        folder (`Path`): Of the run.
    """

    def __init__(self, folder: Path):
        super().__init__()
        self._note = folder / NOTE

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Notes where a run begins, or goes on."""
        self._write(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Notes a round."""
        self._write(state)

    def _write(self, state: TrainerState) -> None:
        if state.is_world_process_zero:
            self._note.parent.mkdir(parents=True, exist_ok=True)
            self._note.write_text(str(state.global_step))


def noted_round(folder: Path) -> int | None:
    """Reads how many rounds a run has behind it, `None` where nothing is noted: it has not begun its first one."""
    try:
        return int((folder / NOTE).read_text())
    except OSError:
        return None
    except ValueError:  # just being written
        return 0
