import pytest
import torch

from hf_fedmoe.federation import ClientStore, Stream, atomic_directory, seed_of


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


def test_client_store_keeps_versions_that_checkpoints_name(tmp_path):
    store = ClientStore(tmp_path / "clients")
    assert store.get(7) == {}
    store.put(7, {"row_P": torch.tensor([1.0])})
    checkpoint = dict(store.manifest)
    store.put(7, {"row_P": torch.tensor([2.0])})
    store.put(8, {"row_P": torch.tensor([3.0])})
    store.prune([checkpoint])
    assert len(list((tmp_path / "clients").iterdir())) == 3
    old = ClientStore(tmp_path / "clients")
    old.manifest = checkpoint
    assert old.get(7)["row_P"].item() == 1.0 and store.get(7)["row_P"].item() == 2.0
    store.prune([])
    assert len(list((tmp_path / "clients").iterdir())) == 2
    with pytest.raises(FileNotFoundError, match=r"State of client 7 is missing .* kept and moved with them"):
        old.get(7)


def test_streams_of_random_numbers_do_not_meet():
    seeds = {
        seed_of(seed, stream, *where)
        for seed in (0, 1)
        for stream in Stream
        for where in [(0,), (1,), (0, 0), (0, 1), (1, 0)]
    }
    assert len(seeds) == 2 * len(Stream) * 5
    assert seed_of(3, Stream.LOCAL_TRAINING, 4, 5) == seed_of(3, Stream.LOCAL_TRAINING, 4, 5) < 2**63
