"""Checkpoints of a [`FederatedTrainer`]: what is written, and what a run goes on from."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, rotate_checkpoints

from ..federation import atomic_directory, check_identity, read_manifest, save_federation
from .adapters import base_fingerprint
from .run_identity import run_identity


# The underscore keeps it from the Hub: `push_to_hub` leaves out `_*`, and clients' own models belong to nobody else.
CLIENTS_FOLDER = "_clients"


class Checkpointing:
    """Writes checkpoints, whole or not at all, and finds the one that a run goes on from."""

    def _checkpoint_to_resume(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """Returns the folder that `train(resume_from_checkpoint)` means, after a look at whether it may be resumed."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"`output_dir` {self.args.output_dir!r} holds no checkpoint to resume from.")
        replaces = self.args.save_strategy != "no" and not self.rounds and Path(self.args.output_dir).is_dir()
        if not resume_from_checkpoint and replaces and get_last_checkpoint(self.args.output_dir):
            raise ValueError(
                f"`output_dir` {self.args.output_dir!r} holds the checkpoints of an earlier run, which this one would "
                "replace: continue it, `train(resume_from_checkpoint=True)`, or choose another `output_dir`."
            )
        if resume_from_checkpoint:
            check_identity(Path(resume_from_checkpoint), self._identity())
        return resume_from_checkpoint or None

    @cached_property
    def _base_fingerprint(self) -> int | None:
        return base_fingerprint(self.strategy.server_models(self.model)[0])

    def _identity(self) -> dict[str, Any]:
        """What two runs must have in common for one to resume the other."""
        modules, layout = self._server_models()
        return run_identity(
            self.args, self.strategy, layout, len(modules), self._base_fingerprint, self.federated_dataset
        )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A whole checkpoint or none: written beside its place, synced, renamed."""
        run_dir = Path(self._get_output_dir(trial=trial))
        target = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.state.best_global_step:
            best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if best.exists() or best == target:
                self.state.best_model_checkpoint = str(best)
        self.processes.on_main(lambda: self._write_checkpoint(run_dir, target))

    def _write_checkpoint(self, run_dir: Path, target: Path) -> None:
        self._active_federation.store.sync()
        with atomic_directory(target) as folder:
            self._save(str(folder))
            for callback in [*self.callback_handler.callbacks, self.control]:
                if isinstance(callback, ExportableState):
                    self.state.stateful_callbacks[type(callback).__name__] = callback.state()
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
            if not self.args.save_only_model:
                federation = self._active_federation
                save_federation(folder, federation.server, federation.store, self._identity())
        if self.args.push_to_hub and self.args.hub_strategy != "end":
            # Trainer's own push of a checkpoint would write a pickle and leave out code and card.
            self.push_to_hub(f"Round {self.state.global_step}", blocking=False)
        rotate_checkpoints(
            output_dir=str(run_dir),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=True,
        )
        checkpoints = run_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        self._active_federation.store.prune([read_manifest(folder) for folder in checkpoints])

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The model and its processor; the arguments as JSON, where `Trainer` writes a pickle."""
        if not self.args.should_save:
            return
        output_dir = Path(output_dir or self.args.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(output_dir, state_dict=state_dict)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)
        (output_dir / "training_args.json").write_text(json.dumps(self.args.to_dict(), indent=2, default=str) + "\n")
