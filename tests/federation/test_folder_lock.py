"""One run at a time in a folder, however the last one ended."""

import errno
import fcntl
import gc
import json
import multiprocessing
import os
import signal
import socket
import time

import pytest

from hf_fedmoe.federation import FolderLock


def in_use(folder):
    return pytest.raises(RuntimeError, match=rf"`output_dir` '{folder}' is in use by another run, ")


def test_a_folder_is_taken_once_and_free_again_afterwards(tmp_path):
    lock = FolderLock(tmp_path)
    assert json.loads((tmp_path / "_lock").read_text()) == {"pid": os.getpid(), "host": socket.gethostname()}
    with in_use(tmp_path) as refusal:
        FolderLock(tmp_path)
    assert "of this process: choose another one, or end that run" in str(refusal.value)
    lock.release()
    lock.release()
    assert not list(tmp_path.iterdir())
    FolderLock(tmp_path).release()


def test_a_lock_that_nobody_refers_to_is_gone(tmp_path):
    lock = FolderLock(tmp_path)
    circle = {"lock": lock}
    circle["self"] = circle  # as trainers and their callbacks refer to each other
    del lock, circle
    again = FolderLock(tmp_path)
    gc.collect()
    with in_use(tmp_path):
        FolderLock(tmp_path)
    again.release()


def _hold(folder, ready):
    lock = FolderLock(folder)
    if os.fork() == 0:  # a worker, which outlives its parent
        time.sleep(10)
        os._exit(0)
    ready.set()
    time.sleep(60)
    lock.release()


def test_another_process_is_named_and_leaves_nothing_when_it_is_killed(tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_hold, args=(tmp_path, ready))
    process.start()
    try:
        assert ready.wait(30)
        with in_use(tmp_path) as refusal:
            FolderLock(tmp_path)
        assert f"process {process.pid} on {socket.gethostname()}" in str(refusal.value)
    finally:
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "_lock").exists()  # and hinders nobody, though a worker of that process lives
    FolderLock(tmp_path).release()
    assert not list(tmp_path.iterdir())


def test_a_forked_process_does_not_hold_its_parents_lock_nor_free_it(tmp_path):
    lock = FolderLock(tmp_path)
    child = os.fork()
    if child == 0:
        lock.release()
        del lock
        gc.collect()
        os._exit(0 if (tmp_path / "_lock").exists() else 1)
    assert os.waitpid(child, 0)[1] == 0
    with in_use(tmp_path):
        FolderLock(tmp_path)
    lock.release()


def test_whoever_waited_for_a_file_that_its_holder_deleted_takes_the_new_one(tmp_path, monkeypatch):
    first, flock, calls = FolderLock(tmp_path), fcntl.flock, []

    def late(descriptor, operation):
        if not calls:
            calls.append(first.release())  # between opening the file and locking it
        return flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    second = FolderLock(tmp_path)
    assert calls and (tmp_path / "_lock").exists()
    with in_use(tmp_path):
        FolderLock(tmp_path)
    second.release()


def test_a_folder_that_cannot_be_locked_is_told_and_used(tmp_path, monkeypatch, caplog):
    def unsupported(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    lock = FolderLock(tmp_path)
    lock.release()
    assert "_lock cannot be locked ([Errno 37] No locks available): take care that no other run" in caplog.text


def test_a_folder_that_was_deleted_meanwhile(tmp_path):
    (tmp_path / "run").mkdir()
    lock = FolderLock(tmp_path / "run")
    (tmp_path / "run" / "_lock").unlink()
    (tmp_path / "run").rmdir()
    (tmp_path / "run").mkdir()
    other = FolderLock(tmp_path / "run")
    lock.release()
    assert (tmp_path / "run" / "_lock").exists()
    other.release()
