"""No checkpoint is resumed that is not, to the byte, what was written: each of its files damaged in each way."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from hf_fedmoe.federation import find_faults
from hf_fedmoe.training import FedMoETrainer
from hf_fedmoe.training.resuming import CLIENTS_FOLDER, choose_checkpoint
from tests.tiny_federation import tiny_args, tiny_federation, tiny_mixture
from tests.tiny_models import CODE_OF_A_MIXTURE, PAD_TOKEN_ID, VOCAB_SIZE


FILES = (
    *("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "training_args.json"),
    *("trainer_state.json", "federation.json", "federation.safetensors", "manifest.json", *sorted(CODE_OF_A_MIXTURE)),
)
# Of one client that took part in both rounds, and is not the only one.
CLIENT = "a client's file"


def run(output_dir, **changes):
    vocabulary = {"[PAD]" if token == PAD_TOKEN_ID else f"w{token}": token for token in range(VOCAB_SIZE)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="w0")), pad_token="[PAD]", unk_token="w0"
    )
    settings = {"rounds": 2, "clients_per_round": 3, "save_strategy": "steps", "preset": "paper"}
    args = tiny_args(output_dir, **settings | {"keep_client_optimizer": True} | changes)
    # The rows follow from the seed too: with all of a client's in one batch, the rest of it may not change a bit.
    data = tiny_federation(3, 4, seed=args.seed)
    return FedMoETrainer(tiny_mixture(), args, train_dataset=data, processing_class=tokenizer)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Two runs of two rounds, which differ in their seeds."""
    folder = tmp_path_factory.mktemp("written")
    run(folder / "own").train()
    run(folder / "other", seed=5).train()
    return folder


def client_files(run_dir, checkpoint):
    clients = json.loads((run_dir / checkpoint / "federation.json").read_text())["clients"]
    return [run_dir / CLIENTS_FOLDER / clients[client] for client in sorted(clients)]


def file_of(run_dir, name, checkpoint="checkpoint-2", client=0):
    return client_files(run_dir, checkpoint)[client] if name == CLIENT else run_dir / checkpoint / name


def flip(place):
    def damage(path, written, name):
        data = bytearray(path.read_bytes())
        index = round(place * (len(data) - 1))
        data[index] ^= 1 << (index % 8)
        path.write_bytes(bytes(data))

    return damage


def cut(share, but=0):
    return lambda path, written, name: path.write_bytes(path.read_bytes()[: round(share * path.stat().st_size) - but])


def exchange(*where, **which):
    return lambda path, written, name: shutil.copy(file_of(written / where[0], name, *where[1:], **which), path)


DAMAGES = {
    "deleted": lambda path, written, name: path.unlink(),
    "emptied": cut(0),
    "cut in half": cut(0.5),
    "without its last byte": cut(1, but=1),
    "longer": lambda path, written, name: path.write_bytes(path.read_bytes() + b"\n"),
    **{f"one bit flipped at {place}": flip(place) for place in (0, 0.1, 0.35, 0.62, 0.9, 1)},
    "of the round before": exchange("own", "checkpoint-1"),
    "of another run": exchange("other", "checkpoint-2"),
    "of another client": exchange("own", "checkpoint-2", client=1),
}
# These files say the same in both rounds and in all runs of one kind of model: exchanged, they are what was written.
ALIKE_IN_RUNS = ("config.json", "tokenizer.json", "tokenizer_config.json", *CODE_OF_A_MIXTURE)
ALIKE_IN_ROUNDS = (*ALIKE_IN_RUNS, "training_args.json")


MATRIX = [(name, damage) for name in (*FILES, CLIENT) for damage in DAMAGES if damage != "of another client"]
MATRIX += [(CLIENT, "of another client")]


@pytest.mark.parametrize(("name", "damage"), MATRIX)
def test_a_damaged_file_is_refused_by_its_name(name, damage, written):
    run_dir = written / "own"
    path = file_of(run_dir, name)
    before = path.read_bytes()
    try:
        DAMAGES[damage](path, written, name)
        if name in {"of the round before": ALIKE_IN_ROUNDS, "of another run": ALIKE_IN_RUNS}.get(damage, ()):
            assert path.read_bytes() == before
            assert choose_checkpoint(True, run_dir).name == "checkpoint-2"
            return
        assert not path.exists() or path.read_bytes() != before
        with pytest.raises(ValueError) as refusal:
            choose_checkpoint(True, run_dir)
        assert str(refusal.value).startswith("checkpoint-2 is damaged: ") and path.name in str(refusal.value)
        assert f"The newest sound one is checkpoint-1: `train(resume_from_checkpoint='{run_dir}" in str(refusal.value)
    finally:
        path.write_bytes(before)


def test_the_matrix_has_every_file(written):
    for run_dir in (written / "own", written / "other"):
        for checkpoint in ("checkpoint-1", "checkpoint-2"):
            folder = run_dir / checkpoint
            assert {str(path.relative_to(folder)) for path in folder.rglob("*")} == set(FILES)
            assert find_faults(folder, run_dir / CLIENTS_FOLDER) == []
    first, second = (client_files(written / "own", name) for name in ("checkpoint-1", "checkpoint-2"))
    assert len(first) == len(second) == 3 and not set(first) & set(second)


def test_a_manifest_of_another_checkpoint_is_known_by_its_round_or_by_all_that_it_lists(written, tmp_path):
    shutil.copytree(written / "own", tmp_path / "own")
    newest, clients = tmp_path / "own" / "checkpoint-2", tmp_path / "own" / CLIENTS_FOLDER
    shutil.copy(written / "own" / "checkpoint-1" / "manifest.json", newest)
    assert find_faults(newest, clients) == ["manifest.json is that of round 1"]
    shutil.copy(written / "other" / "checkpoint-2" / "manifest.json", newest)
    named = [fault.split()[0] for fault in find_faults(newest, clients)]
    differing = {"federation.json", "federation.safetensors", "model.safetensors", "trainer_state.json"}
    assert differing | {"training_args.json"} == {name for name in named if "/" not in name}
    assert sum(name.startswith(f"{CLIENTS_FOLDER}/client-") for name in named) == 3
    # A whole checkpoint of another run lacks the clients' files, and has other settings.
    shutil.copytree(written / "other" / "checkpoint-2", newest, dirs_exist_ok=True)
    assert all(fault.endswith("is missing") for fault in find_faults(newest, clients))


def test_a_renamed_checkpoint_is_not_taken_for_another_round(written, tmp_path):
    shutil.copytree(written / "own", tmp_path / "own")
    (tmp_path / "own" / "checkpoint-2").rename(tmp_path / "own" / "checkpoint-7")
    with pytest.raises(
        ValueError, match=r"checkpoint-7 is damaged: manifest.json is that of round 2\. .*checkpoint-1"
    ):
        choose_checkpoint(True, tmp_path / "own")
    (tmp_path / "own" / "checkpoint-7").rename(tmp_path / "own" / "kept")
    assert choose_checkpoint(tmp_path / "own" / "kept", tmp_path / "own").name == "kept"


def test_further_files_in_the_folder_are_harmless(written, tmp_path):
    shutil.copytree(written / "own", tmp_path / "own")
    for folder in ("checkpoint-2", CLIENTS_FOLDER):
        (tmp_path / "own" / folder / "notes.txt").write_text("mine")
    assert choose_checkpoint(True, tmp_path / "own").name == "checkpoint-2"


@pytest.mark.parametrize("name", ["/etc/passwd", "../checkpoint-1/model.safetensors", "a/../../b", "a\\b"])
@pytest.mark.parametrize("kind", ["files", "clients"])
def test_names_that_lead_out_of_the_folder_are_refused(name, kind, written, tmp_path, resealed):
    shutil.copytree(written / "own", tmp_path / "own")
    resealed(
        tmp_path / "own" / "checkpoint-2", lambda found: found[kind].update({name: found["files"]["config.json"]})
    )
    with pytest.raises(ValueError, match=r"checkpoint-2 is damaged: manifest.json names .*, which is outside its"):
        choose_checkpoint(True, tmp_path / "own")


def test_a_clients_file_has_no_folders(written, tmp_path, resealed):
    shutil.copytree(written / "own", tmp_path / "own")
    resealed(tmp_path / "own" / "checkpoint-2", lambda found: found["clients"].update(a={"size": 1, "sha256": ""}))
    with pytest.raises(ValueError, match="_clients/a is missing"):
        choose_checkpoint(True, tmp_path / "own")
    resealed(tmp_path / "own" / "checkpoint-2", lambda found: found["clients"].update({"a/b": found["clients"]["a"]}))
    with pytest.raises(ValueError, match="names 'a/b', which is no file of a client"):
        choose_checkpoint(True, tmp_path / "own")


@pytest.fixture
def resealed():
    """Changes a manifest as somebody would who knows its checksum."""

    def change(folder: Path, edit):
        found = json.loads((folder / "manifest.json").read_text())
        del found["sha256"]
        edit(found)
        found["sha256"] = hashlib.sha256(json.dumps(found).encode()).hexdigest()
        (folder / "manifest.json").write_text(json.dumps(found, indent=2) + "\n")

    return change


def test_training_does_not_begin_on_a_damaged_checkpoint(written, tmp_path, caplog):
    shutil.copytree(written / "own", tmp_path / "own")
    flip(0.9)(tmp_path / "own" / "checkpoint-2" / "model.safetensors", None, None)
    resumed = run(tmp_path / "own", rounds=3)
    with pytest.raises(ValueError, match=r"checkpoint-2 is damaged: model.safetensors has other content than manifes"):
        resumed.train(resume_from_checkpoint=True)
    assert resumed.rounds == []
    resumed.train(resume_from_checkpoint="latest_sound")
    assert [record.getMessage() for record in caplog.records if "passed over" in record.getMessage()] == [
        "checkpoint-2 is passed over, it is damaged: model.safetensors has other content than manifest.json lists."
    ]
    assert len(resumed.rounds) == 2 and resumed.state.global_step == 3
    assert find_faults(tmp_path / "own" / "checkpoint-2", tmp_path / "own" / CLIENTS_FOLDER) == []
