import errno
import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from hf_fedmoe.federation import (
    ClientStore,
    FileDigest,
    Stream,
    atomic_directory,
    files,
    load_federation,
    read_json,
    remove_directory,
    remove_leftovers,
    save_federation,
    seed_of,
    write_json,
    write_manifest,
)


def test_a_folder_is_whole_or_absent(tmp_path):
    target = tmp_path / "checkpoint-1"
    with pytest.raises(KeyboardInterrupt), atomic_directory(target) as folder:
        (folder / "half.json").write_text("{")
        raise KeyboardInterrupt
    assert not target.exists()
    with atomic_directory(target) as folder:
        (folder / "whole.json").write_text("{}")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["whole.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]  # no leftovers of the first try


def test_an_older_folder_stays_until_the_new_one_is_whole(tmp_path):
    target = tmp_path / "checkpoint-1"
    for text in ("first", "second"):
        with atomic_directory(target) as folder:
            (folder / "file").write_text(text)
            if text == "second":
                assert (target / "file").read_text() == "first"
    assert (target / "file").read_text() == "second"


def test_a_block_that_fails_leaves_the_older_folder_and_nothing_else(tmp_path):
    target = tmp_path / "checkpoint-1"
    with atomic_directory(target) as folder:
        (folder / "file").write_text("first")
    with pytest.raises(OSError, match="No space left"), atomic_directory(target) as folder:
        (folder / "file").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert (target / "file").read_text() == "first"


def test_a_folder_that_cannot_be_renamed_leaves_the_older_one_in_its_place(tmp_path, monkeypatch):
    target, rename = tmp_path / "checkpoint-1", Path.rename
    with atomic_directory(target) as folder:
        (folder / "file").write_text("first")

    def fails_once(self, other):
        if self.name == "_tmp-checkpoint-1":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", fails_once)
    with pytest.raises(OSError, match="Input/output"), atomic_directory(target) as folder:
        (folder / "file").write_text("second")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert (target / "file").read_text() == "first"


def test_a_folder_loses_its_name_before_its_files(tmp_path, monkeypatch):
    """Whoever is killed in between leaves nothing that looks like a checkpoint."""
    seen, rmtree = [], shutil.rmtree

    def watched(path, *arguments, **keywords):
        seen.append((Path(path).name, sorted(other.name for other in tmp_path.iterdir())))
        rmtree(path, *arguments, **keywords)

    (tmp_path / "checkpoint-1").mkdir()
    monkeypatch.setattr(shutil, "rmtree", watched)
    remove_directory(tmp_path / "checkpoint-1")
    assert ("_old-checkpoint-1", ["_old-checkpoint-1"]) in seen and not list(tmp_path.iterdir())


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    names = ("_tmp-checkpoint-3", "_old-checkpoint-2", "checkpoint-3", "_clients", "_old-photographs", "_tmp-notes")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    remove_leftovers(tmp_path, "checkpoint-*")
    assert {path.name for path in tmp_path.iterdir()} == set(names[2:])


def test_a_json_file_that_cannot_be_written_leaves_the_older_one_and_nothing_else(tmp_path, monkeypatch):
    write_json(tmp_path / "facts.json", {"round": 1})
    monkeypatch.setattr(files, "sync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_json(tmp_path / "facts.json", {"round": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["facts.json"]
    assert read_json(tmp_path / "facts.json") == {"round": 1}


def full_disk(path):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_file_is_known_again_by_its_size_and_content(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    known = FileDigest.of(tmp_path / "file")
    assert known == FileDigest(3, hashlib.sha256(b"abc").hexdigest())
    (tmp_path / "file").write_bytes(b"abd")
    assert FileDigest.of(tmp_path / "file") != known


def version(value):
    return {"row_P": torch.tensor([value])}


def put(store, **values):
    """New versions of the clients `c7`, `c8`, ..., as a round writes them; waited for."""
    store.replace({int(name[1:]): store.put(int(name[1:]), version(value)) for name, value in values.items()})
    store.finish_writing()


def test_what_safetensors_had_begun_to_write_is_deleted(tmp_path):
    """Under a name of its own; one of a hundred kills came just then."""
    store = ClientStore(tmp_path / "clients")
    put(store, c7=1.0)
    (tmp_path / "clients" / ".tmpssLP2x").write_bytes(b"half a file")
    store.prune(store.manifest.values())
    assert [path.name for path in (tmp_path / "clients").iterdir()] == list(store.manifest.values())


def test_client_store_keeps_versions_that_checkpoints_name(tmp_path):
    store = ClientStore(tmp_path / "clients")
    assert store.get(7) == {}
    store.prune([])
    put(store, c7=1.0)
    checkpoint = dict(store.manifest)
    store.prune(checkpoint.values())
    put(store, c7=2.0, c8=3.0)
    assert len(list((tmp_path / "clients").iterdir())) == 3
    old = ClientStore(tmp_path / "clients")
    old.manifest = checkpoint
    assert old.get(7)["row_P"].item() == 1.0 and store.get(7)["row_P"].item() == 2.0
    store.prune([])
    assert len(list((tmp_path / "clients").iterdir())) == 2
    with pytest.raises(FileNotFoundError, match=r"State of client 7 is missing .* kept and moved with them"):
        old.get(7)


def test_what_is_read_begins_where_fresh_tensors_do(tmp_path):
    """A sum over memory that begins elsewhere is rounded otherwise, and a resumed run would have other bits."""
    tensors = {f"t{size}_P": torch.arange(float(size)) for size in (1, 3, 5, 40)}
    store = ClientStore(tmp_path / "clients")
    store.manifest[0] = store.put(0, tensors)
    store.finish_writing()
    server = SimpleNamespace(tensors=dict(tensors), integers=[{"n": torch.tensor(3)}], bank_SP=torch.zeros(1))
    save_federation(tmp_path, server, store, {})
    write_manifest(tmp_path, 0, {})
    server.tensors = {}
    load_federation(tmp_path, server, store)
    assert [server.integers[0]["n"].item(), len(load_file(tmp_path / "federation.safetensors"))] == [3, 5]
    for read in (store.get(0), server.tensors):
        assert read.keys() == tensors.keys()
        assert all(
            torch.equal(read[name], tensor) and read[name].data_ptr() % 64 == 0 for name, tensor in tensors.items()
        )


def test_what_was_on_the_host_beside_a_gpu_is_so_again(tmp_path):
    """A method that adds up sums on the host finds them there when it goes on, and all else where its models are."""
    on_a_gpu, on_a_cpu = torch.zeros(1, 3, device="meta"), torch.zeros(1, 3)
    sums = torch.arange(3.0)
    found = {}
    for name, bank_SP in (("gpu", on_a_gpu), ("cpu", on_a_cpu)):
        (tmp_path / name).mkdir()
        server = SimpleNamespace(tensors={"sum_d": sums}, integers=[{"n": torch.tensor(3)}], bank_SP=bank_SP)
        store = ClientStore(tmp_path / "clients")
        save_federation(tmp_path / name, server, store, {})
        write_manifest(tmp_path / name, 0, {})
        server.bank_SP = on_a_gpu
        load_federation(tmp_path / name, server, store)
        found[name] = server.tensors["sum_d"], server.integers[0]["n"]
    assert [[tensor.device.type for tensor in tensors] for tensors in found.values()] == [
        ["cpu", "meta"],
        ["meta"] * 2,
    ]
    assert torch.equal(found["gpu"][0], sums)


def test_client_store_without_checkpoints_has_a_file_for_each_client(tmp_path):
    store = ClientStore(tmp_path / "clients")
    (tmp_path / "clients").mkdir()
    (tmp_path / "clients" / "client-000001-of-a-killed-run.safetensors").write_bytes(b"half")
    (tmp_path / "clients" / "notes.txt").write_text("mine")
    store.prune([])
    for value in range(5):
        put(store, c7=value, **({"c8": value} if value % 2 else {}))
        files = {path.name for path in (tmp_path / "clients").iterdir()}
        assert files == {"notes.txt", *store.manifest.values()}
    assert store.get(7)["row_P"].item() == 4 and store.get(8)["row_P"].item() == 3


def test_only_the_process_that_reads_checkpoints_deletes(tmp_path):
    store = ClientStore(tmp_path / "clients")
    put(store, c7=1.0)
    put(store, c7=2.0)
    assert len(list((tmp_path / "clients").iterdir())) == 2


def test_a_version_that_cannot_be_written_leaves_the_older_one(tmp_path, monkeypatch):
    store = ClientStore(tmp_path / "clients")
    store.prune([])
    put(store, c7=1.0)
    older = store.manifest[7]

    def full(tensors, path):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("hf_fedmoe.federation.client_store.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        put(store, c7=2.0)
    assert [path.name for path in (tmp_path / "clients").iterdir()] == [older]
    assert load_file(tmp_path / "clients" / older)["row_P"].item() == 1.0


def test_a_file_is_sealed_once(tmp_path, monkeypatch):
    store, read = ClientStore(tmp_path / "clients"), []
    digest_of = FileDigest.of.__func__
    monkeypatch.setattr(
        FileDigest, "of", classmethod(lambda cls, path: read.append(path.name) or digest_of(cls, path))
    )
    put(store, c7=1.0, c8=2.0)
    assert read == []  # a round pays nothing
    first = store.seal()
    assert first.keys() == set(store.manifest.values()) == set(read)
    kept = store.manifest[8]
    put(store, c7=3.0)
    assert store.seal().keys() == {kept, store.manifest[7]} and len(read) == 3


def test_files_of_another_store_are_copied_whole(tmp_path):
    one, other = ClientStore(tmp_path / "one"), ClientStore(tmp_path / "other")
    put(one, c7=1.0, c8=2.0)
    for _ in range(2):
        other.adopt(one.folder, [one.manifest[7]])
    assert [path.name for path in other.folder.iterdir()] == [one.manifest[7]]
    other.manifest = dict(one.manifest)
    assert other.get(7)["row_P"].item() == 1.0


def test_streams_of_random_numbers_do_not_meet():
    seeds = {
        seed_of(seed, stream, *where)
        for seed in (0, 1)
        for stream in Stream
        for where in [(0,), (1,), (0, 0), (0, 1), (1, 0)]
    }
    assert len(seeds) == 2 * len(Stream) * 5
    assert seed_of(3, Stream.LOCAL_TRAINING, 4, 5) == seed_of(3, Stream.LOCAL_TRAINING, 4, 5) < 2**63
