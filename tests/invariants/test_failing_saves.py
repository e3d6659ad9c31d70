"""A save that is killed or fails at any of its file operations leaves the checkpoint before, or the new one."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch

from hf_fedmoe.training.resuming import CLIENTS_FOLDER, choose_checkpoint
from tests.every_method import trainer
from tests.file_operations import before_each_operation
from tests.tiny_federation import assert_equal_states, state, timeless


# The method whose clients keep most; checkpoint-1 rotates away, and with it files of clients.
METHOD, SAVED = "fedmoe_paper", 3


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def named_files(run_dir):
    """The client files that the checkpoints of a run name."""
    manifests = [json.loads(path.read_text()) for path in run_dir.glob("checkpoint-*/manifest.json")]
    return {name for manifest in manifests for name in manifest["clients"]}


def in_place_of_the_third_save(output_dir, instead):
    """A run of four rounds; `instead(save, output_dir)` is called once, where its third checkpoint is written."""
    run = trainer(METHOD, output_dir)
    write = run._write_checkpoint

    def watched(target):
        if target.name == f"checkpoint-{SAVED}":
            run._active_federation.store.finish_writing()  # operations of its thread are none of the save's
            instead(lambda: write(target), output_dir)
        write(target)

    run._write_checkpoint = watched
    run.train()
    return run


# Every so many of the operations, and all of them.
EVERY = [pytest.param(12, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=EVERY)
def killed(request, tmp_path_factory):
    """Lists what is on disk after a save that was killed before its n-th operation, for each n; and the whole run."""
    folder = tmp_path_factory.mktemp("killed")
    operations = []

    def kill_at(number, save):
        def act(count, what):
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

        child = os.fork()
        if child == 0:
            with before_each_operation(act):
                save()
            os._exit(0)
        return os.waitpid(child, 0)[1]

    def all_kills(save, output_dir):
        shutil.copytree(output_dir, folder / "before")
        status, number = signal.SIGKILL, 0
        while status == signal.SIGKILL:
            status = kill_at(number, save)
            shutil.copytree(output_dir, folder / str(number))
            shutil.rmtree(output_dir)
            shutil.copytree(folder / "before", output_dir)
            operations.append(number)
            number += request.param
        assert status == 0

    torch.set_num_threads(1)
    return folder, operations, in_place_of_the_third_save(folder / "whole", all_kills)


def test_a_killed_save_leaves_the_checkpoint_before_or_the_new_one(killed):
    folder, operations, _ = killed
    assert operations[-1] > 90
    old = contents(folder / "before" / "checkpoint-2")
    reached = []
    for number in operations:
        newest = choose_checkpoint(True, folder / str(number))  # which compares all files, those of clients too
        reached.append(newest.name)
        if newest.name == "checkpoint-2":
            assert contents(newest) == old
    # The last one was not killed. Where the new checkpoint is there, it stays there.
    assert reached[0] == "checkpoint-2" and reached[-1] == f"checkpoint-{SAVED}"
    assert reached == sorted(reached)


def assert_resumes(killed, number, tmp_path):
    folder, _, whole = killed
    shutil.copytree(folder / str(number), tmp_path / str(number))
    resumed = trainer(METHOD, tmp_path / str(number))
    resumed.train(resume_from_checkpoint=True)
    assert_equal_states(state(resumed.model), state(whole.model))
    assert timeless(resumed.state.log_history)[:-1] == timeless(whole.state.log_history)[:-1]
    left = {path.name for path in (tmp_path / str(number)).iterdir()}
    assert left == {"checkpoint-3", "checkpoint-4", CLIENTS_FOLDER}
    clients = {path.name for path in (tmp_path / str(number) / CLIENTS_FOLDER).iterdir()}
    assert clients == named_files(tmp_path / str(number))


def test_a_run_goes_on_after_a_killed_save_with_the_same_bits(killed, tmp_path):
    operations = killed[1]
    chosen = operations if len(operations) > 90 else operations[3::5]
    for number in chosen:
        assert_resumes(killed, number, tmp_path)
    print(f"{len(chosen)} of {len(operations)} kills resumed")


@pytest.mark.parametrize("every", EVERY)
def test_a_disk_that_is_full_at_any_operation_leaves_the_checkpoint_before_or_the_new_one(every, tmp_path):
    told, synced_last, tolerated, written = [], [], [], []

    def all_failures(save, output_dir):
        shutil.copytree(output_dir, tmp_path / "before")
        before, number, reached = contents(output_dir), 0, True
        while reached:
            reached = False

            def act(count, what, number=number):
                nonlocal reached
                if count == number:
                    reached = True
                    raise OSError(errno.ENOSPC, "No space left on device")

            try:
                with before_each_operation(act):
                    save()
            except OSError as error:
                assert "No space left" in str(error)
                told.append(number)
                left = contents(output_dir)
                # Nothing is left over, and nothing that was there has changed.
                assert {name: left[name] for name in before} == before, number
                if newest := {name for name in left if name not in before}:
                    assert {Path(name).parts[0] for name in newest} == {f"checkpoint-{SAVED}"}
                    synced_last.append(number)
                assert choose_checkpoint(True, output_dir).name == f"checkpoint-{SAVED if newest else 2}"
            else:
                # Libraries look at some files without need, and what is only tidied up may fail: nothing is missing.
                tolerated.append(number)
                written.append(sorted(contents(output_dir / f"checkpoint-{SAVED}")))
                assert choose_checkpoint(True, output_dir).name == f"checkpoint-{SAVED}"
            finally:
                shutil.rmtree(output_dir)
                shutil.copytree(tmp_path / "before", output_dir)
            number += every

    run = in_place_of_the_third_save(tmp_path / "run", all_failures)
    assert run.state.global_step == 4
    assert told[-1] > 70 and len(told) > 2 and all(names == written[-1] for names in written)
    assert len(synced_last) <= 2 and set(synced_last) <= set(told[-2:])  # its new name has not reached the disk
    left = {path.name for path in Path(tmp_path, "run").iterdir()} - {"_lock"}  # a copy, whose run had another one
    assert left == {"checkpoint-3", "checkpoint-4", CLIENTS_FOLDER}


# Client files, which a thread writes behind the rounds: of two clients in each of four rounds, with a checkpoint after
# the second and the fourth.
BEHIND = {"rounds": 4, "save_steps": 2}
CLIENT_FILES = "hf_fedmoe.federation.client_store.save_file"


def at_the_write(number, act):
    """In the place of `save_file`: the `number`-th file of a client, from 1, is written by half; then comes `act`."""
    writes = []

    def save(tensors, path):
        writes.append(path)
        if len(writes) == number:
            Path(path).write_bytes(b"half")
            act()
        safetensors.torch.save_file(tensors, path)

    return save


def no_space():
    raise OSError(errno.ENOSPC, "No space left on device")


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def assert_goes_on(run_dir, tmp_path):
    """From its first checkpoint, with the bits of a run that was never interrupted, and without a file too many."""
    assert choose_checkpoint(True, run_dir).name == "checkpoint-2"
    resumed, whole = (trainer(METHOD, folder, **BEHIND) for folder in (run_dir, tmp_path / "whole"))
    resumed.train(resume_from_checkpoint=True)
    whole.train()
    assert_equal_states(state(resumed.model), state(whole.model))
    assert timeless(resumed.state.log_history)[:-1] == timeless(whole.state.log_history)[:-1]
    assert {path.name for path in (run_dir / CLIENTS_FOLDER).iterdir()} == named_files(run_dir)


# The file that fails, and the rounds that have ended when the run hears of it: in the fourth, or in its checkpoint.
@pytest.mark.parametrize(("number", "rounds"), [(5, 3), (6, 3), (8, 4)])
def test_a_client_file_that_cannot_be_written_ends_the_run(number, rounds, tmp_path, monkeypatch):
    run = trainer(METHOD, tmp_path / "run", **BEHIND)
    with monkeypatch.context() as patched:
        patched.setattr(CLIENT_FILES, at_the_write(number, no_space))
        with pytest.raises(OSError, match=r"\[Errno 28\] No space left on device$"):
            run.train()
    assert len(run.rounds) in (rounds, rounds - 1)  # the round itself may hear of its first file
    assert not any(thread.name.startswith("write-behind") for thread in threading.enumerate())
    assert b"half" not in contents(tmp_path / "run").values()
    assert_goes_on(tmp_path / "run", tmp_path)


def test_without_a_checkpoint_the_end_of_the_run_tells(tmp_path, monkeypatch):
    run = trainer(METHOD, tmp_path / "run", rounds=1, save_strategy="no")
    monkeypatch.setattr(CLIENT_FILES, at_the_write(2, no_space))
    with pytest.raises(OSError, match="No space left"):
        run.train()
    assert b"half" not in contents(tmp_path / "run").values()


def _killed_at(number, output_dir):
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(CLIENT_FILES, at_the_write(number, kill))
        trainer(METHOD, output_dir, **BEHIND).train()


@pytest.mark.parametrize("number", [6, 7])
def test_a_run_that_is_killed_while_a_client_file_is_written_goes_on(number, tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_killed_at, args=(number, tmp_path / "run"))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert b"half" in contents(tmp_path / "run" / CLIENTS_FOLDER).values()
    assert_goes_on(tmp_path / "run", tmp_path)
