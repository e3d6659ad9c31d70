"""Files that a run writes, keeps and deletes in its `output_dir`."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import TrainerCallback

from hf_fedmoe.data import hold_out_client_tests
from hf_fedmoe.federation import FolderLock, find_faults
from hf_fedmoe.strategies import FedRep, Local
from hf_fedmoe.training import FederatedTrainer
from hf_fedmoe.training.resuming import CLIENTS_FOLDER, choose_checkpoint
from tests.tiny_federation import (
    assert_equal_states,
    interrupted_and_resumed,
    state,
    tiny_args,
    tiny_expert,
    tiny_federation,
)


DATA = hold_out_client_tests(tiny_federation(3), 0.3)


def run(output_dir, strategy=None, callbacks=(), **changes):
    args = tiny_args(output_dir, **{"save_strategy": "steps"} | changes)
    return FederatedTrainer(tiny_expert(), args, DATA, strategy=strategy or FedRep(), callbacks=list(callbacks))


def names(folder):
    return {path.name for path in folder.iterdir()}


def client_files(folder):
    return names(folder / CLIENTS_FOLDER)


def named_by(folder, *checkpoints):
    files = [json.loads((folder / name / "federation.json").read_text())["clients"].values() for name in checkpoints]
    return {name for values in files for name in values}


class AfterEachRound(TrainerCallback):
    """Calls `act()` after each round."""

    def __init__(self, act):
        self.act = act

    def on_step_end(self, args, state, control, **kwargs):
        self.act()


def test_a_checkpoint_lists_all_that_it_consists_of(tmp_path):
    trainer = run(tmp_path, rounds=2)
    trainer.train()
    folder = tmp_path / "checkpoint-2"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["round"] == 2
    assert manifest["files"].keys() | {"manifest.json"} == names(folder)
    assert manifest["clients"].keys() == named_by(tmp_path, "checkpoint-2")
    listed = {folder / name: digest for name, digest in manifest["files"].items()}
    listed |= {tmp_path / CLIENTS_FOLDER / name: digest for name, digest in manifest["clients"].items()}
    assert all(digest["size"] == path.stat().st_size > 0 for path, digest in listed.items())
    assert find_faults(folder, tmp_path / CLIENTS_FOLDER) == []
    assert names(tmp_path) == {"checkpoint-1", "checkpoint-2", CLIENTS_FOLDER}


def test_without_checkpoints_each_client_has_one_file(tmp_path):
    counts = []

    def count():
        trainer._active_federation.store.finish_writing()
        counts.append(len(client_files(tmp_path)))

    trainer = run(tmp_path, rounds=8, save_strategy="no", callbacks=[AfterEachRound(count)])
    trainer.train()
    assert counts[-1] == 3 and max(counts) == 3 and counts == sorted(counts)


def test_between_checkpoints_no_more_is_kept_than_they_and_the_run_need(tmp_path):
    counts = []

    def count():
        trainer._active_federation.store.finish_writing()
        checkpoints = [path.name for path in tmp_path.glob("checkpoint-*")]
        current = set(trainer._active_federation.store.manifest.values())
        assert client_files(tmp_path) == named_by(tmp_path, *checkpoints) | current
        counts.append(len(checkpoints))

    trainer = run(tmp_path, rounds=7, save_steps=3, callbacks=[AfterEachRound(count)])
    trainer.train()
    assert counts == [0, 0, 0, 1, 1, 1, 2]
    assert client_files(tmp_path) == named_by(tmp_path, "checkpoint-6", "checkpoint-7")


def test_what_killed_runs_left_is_removed_at_the_next_start(tmp_path):
    run(tmp_path, rounds=2).train()
    needed = client_files(tmp_path)
    for name in ("_tmp-checkpoint-3", "_old-checkpoint-1"):
        shutil.copytree(tmp_path / "checkpoint-2", tmp_path / name)
    shutil.copy(
        tmp_path / CLIENTS_FOLDER / min(needed), tmp_path / CLIENTS_FOLDER / "client-000001-orphan.safetensors"
    )
    seen = []
    watch = AfterEachRound(lambda: seen.append((names(tmp_path), client_files(tmp_path))))
    run(tmp_path, rounds=3, callbacks=[watch]).train(resume_from_checkpoint=True)
    ((folders, clients),) = seen
    assert folders == {"checkpoint-1", "checkpoint-2", CLIENTS_FOLDER, "_lock"}
    assert needed <= clients and "client-000001-orphan.safetensors" not in clients


def test_two_runs_in_one_folder(tmp_path):
    first = run(tmp_path, Local(), rounds=2, save_strategy="no")
    first.train()
    before = first.evaluate_clients()
    second = run(tmp_path, rounds=1)
    with pytest.raises(
        RuntimeError, match=r"`output_dir` .* is in use by another run, of this process: choose anothe"
    ):
        second.train()
    assert first.evaluate_clients() == before and second.rounds == []
    del first  # in a circle of references, as a notebook's cell that is run again leaves it
    second.train()
    assert len(second.rounds) == 1


def test_a_run_whose_clients_are_in_its_checkpoints_gives_the_folder_back(tmp_path):
    first = run(tmp_path, rounds=1)
    first.train()
    second = run(tmp_path, rounds=2)
    second.train(resume_from_checkpoint=True)
    assert first.evaluate_clients() and second.state.global_step == 2
    assert "_lock" not in names(tmp_path)


def test_a_run_that_fails_gives_the_folder_back(tmp_path):
    def fail():
        if failing.state.global_step == 2:
            raise ZeroDivisionError

    failing = run(tmp_path, rounds=4, save_steps=3, callbacks=[AfterEachRound(fail)])
    with pytest.raises(ZeroDivisionError):
        failing.train()
    assert failing._lock is None
    FolderLock(tmp_path).release()


def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_leaves_the_one_before(tmp_path, monkeypatch):
    def full(folder):
        Path(folder, "federation.json").write_text("{")
        raise OSError(28, "No space left on device")

    trainer = run(tmp_path, rounds=4)
    save = trainer._save
    monkeypatch.setattr(trainer, "_save", lambda folder: (full if "checkpoint-3" in folder else save)(folder))
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert names(tmp_path) == {"checkpoint-1", "checkpoint-2", CLIENTS_FOLDER}
    resumed = run(tmp_path, rounds=4)
    resumed.train(resume_from_checkpoint=True)
    whole = run(tmp_path / "whole", rounds=4)
    whole.train()
    assert_equal_states(state(resumed.model), state(whole.model))


def damaged_json(folder):
    (folder / "checkpoint-1" / "federation.json").write_text("{")
    (folder / "checkpoint-1" / "manifest.json").write_text("{")


def foreign(folder):
    shutil.rmtree(folder / "checkpoint-1")
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "trainer_state.json").write_text("{}")


@pytest.mark.parametrize("change", [damaged_json, foreign])
def test_an_older_checkpoint_that_cannot_be_read_is_left_alone_and_ends_no_run(change, tmp_path, caplog):
    run(tmp_path, rounds=2).train()
    needed = named_by(tmp_path, "checkpoint-1")
    change(tmp_path)
    needed = needed | named_by(tmp_path, "checkpoint-2") if change is damaged_json else set()
    resumed = run(tmp_path, rounds=5)
    resumed.train(resume_from_checkpoint=True)
    assert names(tmp_path) == {"checkpoint-1", "checkpoint-4", "checkpoint-5", CLIENTS_FOLDER}
    # Which files a damaged one needs nobody knows: those that were there when the run began are kept, no later ones.
    assert client_files(tmp_path) == named_by(tmp_path, "checkpoint-4", "checkpoint-5") | needed
    assert "checkpoint-1 is left alone, and `save_total_limit` does not count it: manifest.json is" in caplog.text


def test_a_copy_of_a_checkpoint_under_another_name_keeps_its_clients(tmp_path):
    run(tmp_path, rounds=1).train()
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / "kept")
    run(tmp_path, rounds=4).train(resume_from_checkpoint=True)
    assert names(tmp_path) == {"kept", "checkpoint-3", "checkpoint-4", CLIENTS_FOLDER}
    again = run(tmp_path / "again", rounds=2)
    again.train(resume_from_checkpoint=tmp_path / "kept")
    whole = run(tmp_path / "whole", rounds=2)
    whole.train()
    assert_equal_states(state(again.model), state(whole.model))


EVALUATED = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
}


def best_is(trainer, best):
    """Lets the model of a round be the best one, whatever its loss is."""
    evaluate = trainer._evaluate
    trainer._evaluate = lambda *args, **kw: (
        evaluate(*args, **kw) | {"eval_loss": abs(trainer.state.global_step - best)}
    )
    return trainer


@pytest.mark.parametrize(
    ("limit", "left"), [(1, {2}), (2, {2, 5}), (3, {2, 4, 5}), (None, {1, 2, 3, 4, 5}), (0, {1, 2, 3, 4, 5})]
)
def test_the_oldest_checkpoints_go_but_the_best_one_stays(limit, left, tmp_path):
    trainer = best_is(run(tmp_path, rounds=5, save_total_limit=limit, **EVALUATED), 2)
    trainer.train()
    assert {int(path.name[11:]) for path in tmp_path.glob("checkpoint-*")} == left
    assert client_files(tmp_path) >= named_by(tmp_path, *(f"checkpoint-{number}" for number in left))
    assert trainer.evaluate_clients()["clients_accuracy"] >= 0
    assert trainer.args.save_total_limit == limit


def test_only_the_best_checkpoints_are_written_on_request(tmp_path):
    settings = EVALUATED | {"save_strategy": "best"}
    best_is(run(tmp_path, rounds=4, **settings), 3).train()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}
    assert choose_checkpoint(True, tmp_path).name == "checkpoint-3"


def test_a_damaged_best_checkpoint_is_not_loaded(tmp_path):
    def damage():
        if trainer.state.global_step == 3:
            path = tmp_path / "checkpoint-2" / "model.safetensors"
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(bytes(data))

    trainer = best_is(run(tmp_path, rounds=4, callbacks=[AfterEachRound(damage)], **EVALUATED), 2)
    with pytest.raises(
        ValueError, match=r"`load_best_model_at_end` is True, but the best checkpoint checkpoint-2 is .*"
    ):
        trainer.train()
    assert choose_checkpoint(True, tmp_path).name == "checkpoint-4"
    settings = EVALUATED | {"load_best_model_at_end": False}
    resumed = run(tmp_path, rounds=4, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.rounds == [] and resumed.state.global_step == 4


def test_a_run_that_was_moved_finds_its_best_checkpoint(tmp_path):
    best_is(run(tmp_path / "here", rounds=3, **EVALUATED), 2).train()
    (tmp_path / "here").rename(tmp_path / "there")
    resumed = best_is(run(tmp_path / "there", rounds=4, **EVALUATED), 2)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.best_model_checkpoint == str(tmp_path / "there" / "checkpoint-2")
    stored = tiny_expert().from_pretrained(tmp_path / "there" / "checkpoint-2")
    assert_equal_states(state(resumed.model), state(stored))


def test_a_trainer_that_was_interrupted_is_followed_by_another_in_one_process(tmp_path):
    resumed = interrupted_and_resumed(lambda: run(tmp_path / "own", rounds=4))
    whole = run(tmp_path / "whole", rounds=4)
    whole.train()
    assert_equal_states(state(resumed.model), state(whole.model))
    np.testing.assert_equal(resumed.evaluate_clients(), whole.evaluate_clients())
