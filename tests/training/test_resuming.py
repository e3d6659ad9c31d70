"""`train(resume_from_checkpoint=...)`: what it takes, and what it says about everything else."""

import json
import shutil
from pathlib import Path

import pytest

from hf_fedmoe.strategies import FedRep
from hf_fedmoe.training import FederatedTrainer
from hf_fedmoe.training.resuming import CLIENTS_FOLDER, choose_checkpoint, in_words, numbered_checkpoints
from tests.tiny_federation import assert_equal_states, state, tiny_args, tiny_expert, tiny_federation


def run(output_dir, **changes):
    settings = {"rounds": 2, "save_strategy": "steps", "clients_per_round": 3} | changes
    return FederatedTrainer(tiny_expert(), tiny_args(output_dir, **settings), tiny_federation(3), strategy=FedRep())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(folder).train()
    return folder


@pytest.fixture
def own(finished, tmp_path):
    """A copy of two rounds of FedRep, whose clients keep their heads."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def test_every_way_to_name_a_checkpoint(own):
    newest = own / "checkpoint-2"
    for wanted in (True, "latest_sound", str(newest), newest, f"{newest}/"):
        assert choose_checkpoint(wanted, own) == newest
    assert choose_checkpoint(own / "checkpoint-1", own).name == "checkpoint-1"


@pytest.mark.parametrize(
    "wanted", ["", "true", "True", "latest", "nowhere/checkpoint-3", Path("nowhere"), 3, 1, 1.0, [], b"checkpoint-2"]
)
def test_what_is_no_folder_is_refused_by_its_value(wanted, own):
    with pytest.raises(ValueError) as refusal:
        run(own).train(resume_from_checkpoint=wanted)
    assert (
        f"`resume_from_checkpoint` is {wanted!r}, which is no folder: give that of a checkpoint, `True` for the"
        in str(refusal.value)
    )


def test_a_file_is_no_folder(own):
    with pytest.raises(ValueError, match=r"model.safetensors', which is no folder"):
        choose_checkpoint(str(own / "checkpoint-2" / "model.safetensors"), own)


def test_the_folder_of_the_run_names_its_checkpoints(own):
    with pytest.raises(
        ValueError, match=r"has no federation.json.* It holds checkpoints: name one of them, .*oint-2'"
    ):
        choose_checkpoint(own, own)


def test_a_checkpoint_of_a_plain_trainer(own):
    for name in ("federation.json", "federation.safetensors", "manifest.json"):
        (own / "checkpoint-2" / name).unlink()
    with pytest.raises(ValueError, match=r"checkpoint-2, which has no federation.json: .* `from_pretrained` instead"):
        choose_checkpoint(True, own)
    assert choose_checkpoint("latest_sound", own).name == "checkpoint-1"


def test_a_checkpoint_of_a_model_only(tmp_path):
    run(tmp_path, save_only_model=True).train()
    assert not (tmp_path / "checkpoint-2" / "federation.json").exists()
    with pytest.raises(
        ValueError, match="checkpoint-2 holds a model only, `save_only_model`: load that with `from_pr"
    ):
        choose_checkpoint(True, tmp_path)
    with pytest.raises(ValueError, match="holds no sound checkpoint: start anew in another one"):
        choose_checkpoint("latest_sound", tmp_path)


def test_a_checkpoint_of_an_earlier_version_has_no_manifest(own):
    (own / "checkpoint-2" / "manifest.json").unlink()
    with pytest.raises(
        ValueError, match=r"checkpoint-2 is damaged: manifest.json is missing: it was deleted, or an ear"
    ):
        choose_checkpoint(True, own)


def test_no_checkpoint_at_all(tmp_path):
    for wanted in (True, "latest_sound"):
        with pytest.raises(ValueError, match="holds no checkpoint to resume from"):
            choose_checkpoint(wanted, tmp_path)
        with pytest.raises(ValueError, match="holds no checkpoint to resume from"):
            choose_checkpoint(wanted, tmp_path / "nowhere")


def test_nothing_is_sound(own):
    for path in own.glob("checkpoint-*/federation.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"federation.safetensors has 0 bytes, .* There is no sound one in `output_dir`"
    ):
        choose_checkpoint(True, own)
    with pytest.raises(ValueError, match="holds no sound checkpoint"):
        choose_checkpoint("latest_sound", own)


def test_checkpoints_are_numbered_as_numbers_and_nothing_else_is_one(tmp_path):
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-x", "checkpoint-3-copy", "_tmp-checkpoint-11", "best"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-12").write_text("a file")
    assert [path.name for path in numbered_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    assert numbered_checkpoints(tmp_path / "nowhere") == []


def test_many_faults_are_counted():
    assert in_words(["a", "b"]) == "a; b"
    assert in_words([str(number) for number in range(7)]) == "0; 1; 2; 3; 4; and 2 more"


def test_a_run_that_was_moved_goes_on_where_it_is(own, tmp_path):
    whole = run(tmp_path / "whole", rounds=3)
    whole.train()
    own.rename(tmp_path / "moved")
    resumed = run(tmp_path / "moved", rounds=3)
    resumed.train(resume_from_checkpoint=True)
    assert_equal_states(state(resumed.model), state(whole.model))


def test_a_run_goes_on_in_another_folder_with_its_clients(own, tmp_path):
    """FedRep's clients would find their heads nowhere, and be refused in every round."""
    whole, resumed = run(tmp_path / "whole", rounds=3), run(tmp_path / "branch", rounds=3)
    whole.train()
    resumed.train(resume_from_checkpoint=str(own / "checkpoint-2"))
    assert resumed.rounds[0].refused == {}
    assert_equal_states(state(resumed.model), state(whole.model))
    named = json.loads((tmp_path / "branch" / "checkpoint-3" / "federation.json").read_text())["clients"].values()
    assert {path.name for path in (tmp_path / "branch" / CLIENTS_FOLDER).iterdir()} == set(named)
    assert choose_checkpoint(True, own).name == "checkpoint-2"  # which has lost nothing


def test_clients_that_were_left_behind_are_named(own, tmp_path):
    shutil.copytree(own / "checkpoint-2", tmp_path / "alone" / "checkpoint-2")
    with pytest.raises(
        ValueError, match=r"checkpoint-2 is damaged: _clients/client-0.* is missing; _clients/client-0"
    ):
        choose_checkpoint(True, tmp_path / "alone")
