"""Checkpoints of a [`FederatedTrainer`]: what is written, and what a run goes on from."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from transformers.utils import logging

from ..data.counted import counted
from ..federation import (
    ClientStore,
    FolderLock,
    UnreadableManifestError,
    atomic_directory,
    find_faults,
    has_federation,
    has_manifest,
    read_identity,
    read_manifest,
    remove_directory,
    remove_leftovers,
    save_federation,
    write_manifest,
)
from ..models.modeling_adapted import save_base_configs
from .adapters import base_fingerprint
from .checks import make_folder
from .columns import ModelColumns
from .local_paths import forget_where_it_was, without_local_paths
from .resuming import CLIENTS_FOLDER, choose_checkpoint, in_words, numbered_checkpoints
from .run_identity import check_identity, run_identity
from .several_processes import SeveralProcesses
from .termination import SigtermWatch, TerminatedError


logger = logging.get_logger(__name__)


class Checkpointing(ModelColumns, SeveralProcesses):
    """Writes checkpoints, whole or not at all, and finds the one that a run goes on from."""

    _lock: FolderLock | None = None
    _identity_of_run: dict[str, Any] | None = None
    # By which a run that was stopped goes on; commands know a way of their own.
    goes_on_by = "`train(resume_from_checkpoint=True)`"
    # The checkpoint that this run has written last, or gone on from.
    _newest_checkpoint: Path | None = None

    # Around a run

    def train(
        self, resume_from_checkpoint: str | os.PathLike | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Chooses the checkpoint, and has `output_dir` for this run alone; see [`FederatedTrainer.train`]."""
        self._identity_of_run = self._newest_checkpoint = None
        # By the name of a checkpoint's folder, the client files that it needs.
        self._needed: dict[str, set[str]] = {}
        with SigtermWatch() as self._sigterm, self._sole_use_of_output_dir():
            folder = self.processes.on_main(lambda: self._checkpoint_to_resume(resume_from_checkpoint))
            return super().train(folder, *args, **kwargs)

    @contextmanager
    def _sole_use_of_output_dir(self) -> Iterator[None]:
        """
        Keeps other runs out while this one writes: afterwards too, for as long as this trainer lives, if its clients
        keep something that is in no checkpoint and would be lost.
        """
        self.processes.on_main(self._take_lock)
        still_needed = False
        try:
            yield
            still_needed = self._has_unsaved_clients()
        finally:
            if self._lock is not None and not still_needed:
                self._lock.release()
                self._lock = None

    def _take_lock(self) -> None:
        if self._lock is None:
            self._output_dir.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(self._output_dir)

    def _has_unsaved_clients(self) -> bool:
        """Tells whether an evaluation of clients needs files that are in no checkpoint."""
        if self._lock is None or (self.args.load_best_model_at_end and not self.args.save_only_model):
            return False
        assert self._left is not None  # a run has ended
        _, _, store = self._left
        return not self._named_by_checkpoints().issuperset(store.manifest.values())

    # What to go on from

    def _checkpoint_to_resume(self, wanted: str | os.PathLike | bool | None) -> str | None:
        """Returns the folder that `train(resume_from_checkpoint=wanted)` means, with its clients' files at hand."""
        output_dir = self._output_dir
        if wanted is None or wanted is False:
            if self.args.save_strategy != "no" and not self.rounds and numbered_checkpoints(output_dir):
                raise ValueError(
                    f"`output_dir` {self.args.output_dir!r} holds the checkpoints of an earlier run, which this one "
                    "would replace: continue it, `train(resume_from_checkpoint=True)`, or choose another `output_dir`."
                )
            return None
        folder = self._newest_checkpoint = choose_checkpoint(wanted, output_dir)
        if not folder.parent.samefile(output_dir):
            clients = read_manifest(folder).clients
            ClientStore(output_dir / CLIENTS_FOLDER).adopt(folder.parent / CLIENTS_FOLDER, clients)
        return str(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # Here, since the tokenizer's special tokens are in the configuration by now.
        folder = Path(resume_from_checkpoint)
        check_identity(read_identity(folder), self._identity(), folder.name)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, resume: str | None, trial: Any
    ) -> tuple[int, int]:
        result = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, resume, trial)
        if self.args.save_strategy != "no":
            self._identity()  # as it is now: a strategy's attributes may change later
        if resume is not None:
            # The path in the state is that of the day when it was written.
            written = TrainerState.load_from_json(str(Path(resume, TRAINER_STATE_NAME))).best_model_checkpoint
            if written is not None and (best := Path(resume).with_name(Path(written).name)).is_dir():
                self.state.best_model_checkpoint = str(best)
        return result

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None  # or nobody loads it
        best = Path(self.state.best_model_checkpoint)
        faults = self.processes.on_main(lambda: find_faults(best, best.parent / CLIENTS_FOLDER))
        if faults:
            raise ValueError(
                f"`load_best_model_at_end` is True, but the best checkpoint {best.name} is not as it was written, "
                f"{in_words(faults)}. The last round's model is in the newest checkpoint: load that with "
                "`from_pretrained`, or resume from it with `load_best_model_at_end=False`."
            )
        super()._load_best_model()

    def _finalize_training(self, trial: Any, num_train_samples: float, start_time: float) -> TrainOutput:
        """Ends a run as [`~transformers.Trainer`] does, which would delete checkpoints in place, others' too."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            output = super()._finalize_training(trial, num_train_samples, start_time)
        finally:
            self.args.save_total_limit = limit
        best = self.state.best_model_checkpoint
        if best is not None and limit == 1 and self.is_world_process_zero():
            self._rotate(Path(best))
            assert self._active_federation is not None
            self._prune(self._active_federation.store)
        return output

    @cached_property
    def _base_fingerprint(self) -> int | None:
        return base_fingerprint(self.strategy.server_models(self.model)[0])

    def _identity(self) -> dict[str, Any]:
        """Gives what two runs must have in common for one to resume the other, as it was when this one began."""
        if self._identity_of_run is None:
            modules, layout = self._server_models()
            self._identity_of_run = run_identity(
                self.args,
                self.strategy,
                modules,
                layout,
                self._base_fingerprint,
                self._data,
                self._columns_of_clients().column_names,
                self.model.config,
                self.train_data_collator,
            )
        return self._identity_of_run

    # What is written

    def _tidy_up(self, store: ClientStore) -> None:
        """Removes what killed runs left in `output_dir`, and the client files that nothing names."""
        if self.is_world_process_zero():
            remove_leftovers(self._output_dir, f"{PREFIX_CHECKPOINT_DIR}-*")
            self._prune(store)

    def _checkpoint_of(self, step: int) -> Path:
        return self._output_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A whole checkpoint or none: written beside its place, synced, renamed."""
        target = self._checkpoint_of(self.state.global_step)
        if self.state.best_global_step:
            best = self._checkpoint_of(self.state.best_global_step)
            if best.exists() or best == target:
                self.state.best_model_checkpoint = str(best)
        self.processes.on_main(lambda: self._write_checkpoint(target))

    def _write_checkpoint(self, target: Path) -> None:
        federation = self._active_federation
        assert federation is not None
        clients = {} if self.args.save_only_model else federation.store.seal()
        with atomic_directory(target) as folder:
            self._save(str(folder))
            # A dict since the state was made, whatever transformers declares.
            exported: Any = self.state.stateful_callbacks
            for callback in [*self.callback_handler.callbacks, self.control]:
                if isinstance(callback, ExportableState):
                    exported[type(callback).__name__] = callback.state()
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
            if not self.args.save_only_model:
                save_federation(folder, federation.server, federation.store, self._identity())
            write_manifest(folder, self.state.global_step, clients)
        self._newest_checkpoint = target
        if self.args.push_to_hub and self.args.hub_strategy != "end":
            # Trainer's own push of a checkpoint would write a pickle and leave out code and card.
            self.push_to_hub(f"Round {self.state.global_step}", blocking=False)
        with _goes_on():
            self._rotate(target)
        self._prune(federation.store)

    def _rotate(self, newest: Path) -> None:
        """Deletes the oldest checkpoints beyond `save_total_limit`, but not the best one, nor what it cannot read."""
        limit = self.args.save_total_limit
        if limit is None or limit <= 0:
            return
        own = []
        for folder in numbered_checkpoints(newest.parent):
            try:
                read_manifest(folder)
                own.append(folder)
            except UnreadableManifestError as error:
                logger.warning_once(f"{folder} is left alone, and `save_total_limit` does not count it: {error}.")
        kept = {newest.resolve(), Path(self.state.best_model_checkpoint or newest).resolve()}
        spare = [folder for folder in own if folder.resolve() not in kept]
        excess = len(own) - max(limit, len(own) - len(spare))
        for folder in spare[: max(0, excess)]:
            with _goes_on():
                remove_directory(folder)

    def _prune(self, store: ClientStore) -> None:
        """Deletes the clients' files that nothing needs."""
        with _goes_on():
            store.prune(self._named_by_checkpoints())

    def _named_by_checkpoints(self) -> set[str]:
        """
        The client files that the checkpoints in `output_dir` need, copies of them under other names included. One that
        cannot be read needs what it named when it could, or else whatever there was when it was seen first.
        """
        present = [
            folder
            for folder in self._output_dir.iterdir()
            if not folder.name.startswith("_") and (has_manifest(folder) or has_federation(folder))
        ]
        for folder in present:
            try:
                self._needed[folder.name] = set(read_manifest(folder).clients)
            except UnreadableManifestError as error:
                logger.warning_once(f"{folder} may need files of clients, none of which are deleted: {error}.")
                clients = (self._output_dir / CLIENTS_FOLDER).glob("*")
                self._needed.setdefault(folder.name, {path.name for path in clients})
        return {name for folder in present for name in self._needed[folder.name]}

    # When SIGTERM comes

    def _end_on_sigterm(self) -> None:
        """Ends a run between two rounds if SIGTERM has come."""
        if self._sigterm.received:
            self._save_before_the_end()
            raise TerminatedError

    def _save_before_the_end(self) -> None:
        """
        Writes the checkpoint of the last finished round, unless there is one. The main process does it by itself: the
        others may have gone already.
        """
        if not self.is_world_process_zero():
            return
        step, target = self.state.global_step, self._checkpoint_of(self.state.global_step)
        if self.args.save_strategy == "no" or self.args.save_only_model or step == 0:
            logger.warning(f"SIGTERM ends the run after {counted(step, 'round')}, without a checkpoint to go on from.")
            return
        if self._newest_checkpoint is None or self._newest_checkpoint.resolve() != target.resolve():
            self._write_checkpoint(target)
        logger.warning(
            f"SIGTERM ends the run after round {step}: {target.name} is written, {self.goes_on_by} goes on from there."
        )

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The model and its processor; the arguments as JSON, where `Trainer` writes a pickle."""
        if not self.args.should_save:
            return
        folder = Path(output_dir) if output_dir else self._output_dir
        make_folder(folder)
        self.model.save_pretrained(folder, state_dict=state_dict)
        forget_where_it_was(folder / "config.json")
        if isinstance(self.model, PeftModel):
            save_base_configs(self.model, folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        (folder / "training_args.json").write_text(
            json.dumps(without_local_paths(self.args.to_dict()), indent=2, default=str) + "\n"
        )


@contextmanager
def _goes_on() -> Iterator[None]:
    """Tells of files that cannot be deleted: no run has to end for that."""
    try:
        yield
    except OSError as error:
        logger.warning(f"Old files could not be deleted: {error}.")
