"""Client files that are written behind the run: held back, failing, and more of them than memory may hold."""

import errno
import threading
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from hf_fedmoe.federation import ClientStore, client_store
from hf_fedmoe.federation.write_behind import WriteBehind, host_copies


SAVE = "hf_fedmoe.federation.client_store.save_file"


@pytest.fixture
def held_back(monkeypatch):
    """Has every file wait for an event before it is written."""
    event = threading.Event()

    def save(tensors, path):
        assert event.wait(30)
        safetensors.torch.save_file(tensors, path)

    monkeypatch.setattr(SAVE, save)
    yield event
    event.set()


@pytest.fixture
def store(tmp_path):
    store = ClientStore(tmp_path / "clients")
    store.prune([])
    yield store
    store._behind._threads.shutdown()


def kept(value):
    return {
        "row_P": torch.full((3,), value, dtype=torch.bfloat16),
        "optimizer.0.step": torch.tensor(value),
        "mask": torch.tensor([[True, False]]).T,  # not contiguous
    }


def put(store, client, value):
    tensors = kept(value)
    store.replace({client: store.put(client, tensors)})
    for tensor in tensors.values():
        tensor.zero_()  # as a round does with memory that it uses again


def files(store):
    return sorted(path.name for path in store.folder.iterdir())


def in_background(work):
    """A thread that does `work`, and whether it waits."""
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(0.1)
    return thread, thread.is_alive()


def assert_kept(found, value):
    expected = kept(value)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name])


def test_what_is_not_on_disk_yet_has_the_same_bits(store, held_back):
    put(store, 7, 1.5)
    assert files(store) == []
    for _ in range(2):
        found = store.get(7)
        assert_kept(found, 1.5)
        for tensor in found.values():
            tensor.zero_()  # the reader's own
    held_back.set()
    store.finish_writing()
    assert files(store) == [store.manifest[7]] and store._unwritten == {}
    assert_kept(store.get(7), 1.5)


def test_a_version_is_deleted_when_the_one_in_its_place_is_there(store, held_back):
    held_back.set()
    put(store, 7, 1.0)
    store.finish_writing()
    old = store.manifest[7]
    held_back.clear()
    put(store, 7, 2.0)
    put(store, 7, 3.0)  # in the place of one that is being written
    time.sleep(0.05)
    assert files(store) == [old]
    held_back.set()
    store.finish_writing()
    assert files(store) == [store.manifest[7]]
    assert_kept(store.get(7), 3.0)


@pytest.mark.parametrize("waits", ["seal", "finish_writing", "close", "prune"])
def test_what_needs_the_files_waits_for_them(waits, store, held_back):
    put(store, 7, 1.0)
    call = {"prune": lambda: store.prune([])}.get(waits, getattr(store, waits))
    thread, has_waited = in_background(call)
    assert has_waited and files(store) == []
    held_back.set()
    thread.join(30)
    assert not thread.is_alive() and files(store) == [store.manifest[7]]


def test_no_more_than_so_much_is_in_memory(tmp_path, held_back, monkeypatch):
    size = sum(tensor.nbytes for tensor in kept(0.0).values())
    monkeypatch.setattr(client_store, "MAX_UNWRITTEN_BYTES", 2 * size)
    store = ClientStore(tmp_path / "clients")
    put(store, 0, 0.0), put(store, 1, 1.0)
    thread, has_waited = in_background(lambda: put(store, 2, 2.0))
    assert has_waited and len(store._unwritten) == 2
    held_back.set()
    thread.join(30)
    store.close()
    assert store._unwritten == {} and len(files(store)) == 3
    assert_kept(store.get(2), 2.0)


def test_a_job_larger_than_all_room_is_done_alone():
    behind, done = WriteBehind(10), []
    for number in range(3):
        behind.make_room(20)
        assert len(done) == number
        behind.add(20, done.append, number)
    behind.close()
    assert done == [0, 1, 2]


@pytest.fixture
def full(monkeypatch):
    """Lets the second of all writes fail half-way."""
    calls = []

    def save(tensors, path):
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        safetensors.torch.save_file(tensors, path)

    monkeypatch.setattr(SAVE, save)


@pytest.mark.parametrize("told", ["put", "seal", "finish_writing", "close"])
def test_a_failed_write_is_told_of_by_all_that_follows_and_leaves_nothing(told, store, full):
    put(store, 7, 1.0)
    old = store.manifest[7]
    put(store, 7, 2.0)
    store._behind.rest()
    calls = {"put": lambda: store.put(8, kept(3.0))}
    for _ in range(2):
        assert_kept(store.get(7), 2.0)  # a client that is trained meanwhile is not at fault
        with pytest.raises(OSError, match=r"\[Errno 28\] No space left on device$"):
            calls.get(told, getattr(store, told))()
    store.prune([old])
    with pytest.raises(OSError, match="No space left"):
        store.seal()
    assert files(store) == [old] and store.digests == {}


def test_the_thread_ends_with_the_run(store):
    put(store, 7, 1.0)
    names = [thread.name for thread in threading.enumerate()]
    assert sum(name.startswith("write-behind") for name in names) == 1
    store.close()
    assert not any(thread.name.startswith("write-behind") for thread in threading.enumerate())
    assert_kept(store.get(7), 1.0)


def test_copies_own_their_memory():
    row_P = torch.arange(6.0, requires_grad=True)
    tensors = {"a": row_P[:3], "b": row_P.view(2, 3).T, "c": torch.tensor(4)}
    copies = host_copies(tensors)
    assert len({copy.untyped_storage().data_ptr() for copy in copies.values()}) == 3
    for name, copy in copies.items():
        assert copy.is_contiguous() and not copy.requires_grad and torch.equal(copy, tensors[name].detach())
        assert copy.untyped_storage().nbytes() == copy.nbytes


def test_what_comes_last_begins_when_all_before_has_ended(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    behind, held, done = WriteBehind(100), threading.Event(), []

    def first():
        held.wait(30)
        done.append("first")

    def second():
        done.append("second")
        raise OSError("the disk is full")

    behind.add(1, first)
    behind.add(1, second)
    behind.add_last(done.append, "last")
    while done != ["second"]:  # in a thread of its own
        time.sleep(0.01)
    held.set()
    with pytest.raises(OSError, match="full"):
        behind.close()
    assert done == ["second", "first", "last"]
