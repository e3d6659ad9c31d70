"""The recipe of owners of text: its figures by hand, its files, and what it refuses."""

import json
import math
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import PartialState

from hf_fedmoe import FedMoEForCausalLM
from hf_fedmoe.experiments import owners_main
from hf_fedmoe.experiments.language_scores import bits_per_byte, likelihood_router, log_likelihoods, uniform_ensemble
from hf_fedmoe.owners import pack
from tests.tiny_decoders import tiny_mixture
from tests.tiny_owners import save_base, text_of
from tests.tiny_tokenizer import tiny_tokenizer


RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = ["--owners", "court", "press", "--opt_out", "press", "--unseen", "films", "--sequence_length", "16"]
SMALL += ["--steps", "4", "--lora_rank", "4", "--test_sequences", "5"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    save_base(tmp_path / "base")
    rows = []
    for owner in ("court", "press", "public", "films"):
        for split in ("train", "reserved", "test"):
            rows.append({"owner": owner, "split": split, "text": text_of(owner + split)})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "texts.parquet")
    shutil.copy(RECIPES / "owners_lm.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["owners_lm.py", "--base", "base", "--texts", "texts.parquet", *SMALL, *words])
    owners_main(Path("owners_lm.yaml"))


@pytest.mark.parametrize(("owner", "split"), [("films", "test"), ("press", "train")])
def test_texts_that_are_too_short_are_named_before_anything_is_trained(place, monkeypatch, capsys, owner, split):
    rows = pq.read_table("texts.parquet").to_pylist()
    for row in rows:
        if (row["owner"], row["split"]) == (owner, split):
            row["text"] = "two words"
    pq.write_table(pa.Table.from_pylist(rows), "texts.parquet")
    with pytest.raises(SystemExit):
        run(monkeypatch)
    said = capsys.readouterr()
    assert f"The {split} text of {owner!r}: `text` has " in said.err and "and `sequence_length` is 16" in said.err
    assert "steps, loss" not in said.out and not Path("runs/owners_lm/seed-0").exists()


def test_cores_are_counted_when_the_device_is_known(place, monkeypatch):
    """On a machine with a GPU, `use_cpu` is what makes it a process on a CPU."""
    told = []

    def counted():
        told.append(PartialState().device.type)
        raise KeyboardInterrupt

    PartialState._reset_state()
    PartialState().device = torch.device("meta")  # what accelerate would take by itself
    monkeypatch.setattr("hf_fedmoe.experiments.language_owners.use_all_cores", counted)
    with pytest.raises(SystemExit):
        run(monkeypatch)
    PartialState._reset_state()
    assert told == ["cpu"]


def test_the_recipe_from_texts_to_tables(place, monkeypatch, capsys):
    run(monkeypatch, "--seed", "1")
    said = capsys.readouterr().out
    folder = Path("runs/owners_lm/seed-1")
    table = (folder / "table.md").read_text()
    assert table in said and "Sequences are shorter than the 64 tokens" in table
    assert said.count("press (") == 2 and "runs/owners_lm/seed-1/without-press goes on:" in said
    found = json.loads((folder / "results.json").read_text())
    assert list(found) == ["base", "court", "press", "mixture, soft", "mixture, top-1", "without"]
    soft = found["mixture, soft"]
    cells = [f"{value:.3f}" for value in ((soft["court"] + soft["press"]) / 2, *soft.values())]
    assert f"| mixture, soft | {' | '.join(cells)} |" in table and "| without press |" in table
    mixture = FedMoEForCausalLM.from_pretrained(folder / "mixture")
    fewer = FedMoEForCausalLM.from_pretrained(folder / "without-press")
    text = text_of("presstest")
    ids = torch.tensor(pack(tiny_tokenizer(), [text], 16)[:5])
    count = sum(len(each.encode()) for each in tiny_tokenizer().batch_decode(ids[:, 1:]))
    with torch.no_grad():
        for row, model, how in (
            ("base", mixture, {"expert": "base"}),
            ("court", mixture, {"expert": "court"}),
            ("mixture, soft", mixture, {}),
            ("without", fewer, {}),
        ):
            bits = model(input_ids=ids, labels=ids, **how).loss.item() * ids[:, 1:].numel() / math.log(2)
            assert found[row]["press"] == pytest.approx(bits / count, rel=1e-5)


def test_an_earlier_run_is_kept(place, monkeypatch, capsys):
    kept = place / "runs" / "owners_lm" / "seed-0" / "table.md"
    kept.parent.mkdir(parents=True)
    kept.write_text("of an hour")
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch)
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "`output_dir` is 'runs/owners_lm', which holds seed-0 of an earlier run" in said
    assert kept.read_text() == "of an hour"


def test_figures_by_hand():
    found = torch.tensor([[0.5, 0.25], [0.125, 0.75]]).log()[:, None]
    assert torch.allclose(uniform_ensemble(found).exp(), torch.tensor([[0.3125, 0.5]]))
    # After the first token the experts have 4 : 1.
    assert torch.allclose(likelihood_router(found).exp(), torch.tensor([[0.3125, 0.8 * 0.25 + 0.2 * 0.75]]))
    assert bits_per_byte(torch.tensor([[0.5, 0.25]]).log(), 2) == pytest.approx(1.5)


def test_the_soup_is_the_mean_of_the_updates():
    mixture, ids = tiny_mixture("gpt2"), torch.arange(3, 19)[None]
    weights = torch.tensor([[[0, 1 / 3, 1 / 3, 1 / 3]]])
    merged = mixture.merge("base")
    with torch.no_grad():
        for name in ("court", "press", "code"):
            own = mixture.merge(name)
            for layer in mixture.target_names:
                base = mixture.base.get_submodule(layer).weight
                merged.get_submodule(layer).weight += (own.get_submodule(layer).weight - base) / 3
        soup = log_likelihoods(mixture, ids, expert_weights=weights)
        logits = merged(input_ids=ids).logits[:, :-1].log_softmax(-1)
    torch.testing.assert_close(soup, logits.gather(-1, ids[:, 1:, None])[..., 0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--opt_out", "code"], r"`opt_out` is 'code': choose one of the owners ['court', 'press']."),
        (["--steps", "0"], "`steps` is 0: give a whole number of at least 1."),
        (["--seed", "-1"], "`seed` is -1: give a whole number from 0 to"),
        (["--unseen", "tweets"], "`texts` is 'texts.parquet', which has no test text of 'tweets': choose from"),
        (["--texts", "none.parquet"], "`texts` is 'none.parquet', which cannot be read"),
        (["--part", "train"], "`part` is 'train'"),
        (["--owners", "court", "court", "press"], "'court' is twice among `owners`, `public` and `unseen`: name it"),
        (["--unseen", "public"], "'public' is twice among `owners`, `public` and `unseen`: name it once."),
        (["--owners", "press", "mixture"], "`owners` has 'mixture', as a folder beside theirs is called"),
        (["--learning_rate", "-1"], "`learning_rate` is -1.0: give a number above 0."),
        (["--epsilon", "-1"], "`epsilon` is -1.0: give a number above 0, or 0 for none."),
        (["--stepz", "3"], "There is no setting 'stepz': is it steps"),
    ],
)
def test_wrong_settings_are_told_in_one_line(place, monkeypatch, capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *words)
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and said.startswith(f"owners_lm: {message}") and "\n" not in said
    assert not Path("runs").exists()


def test_help_names_presets_and_values(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["owners_lm.py", "--help"])
    owners_main(RECIPES / "owners_lm.yaml")
    said = capsys.readouterr().out
    assert "smollm2 (" in said and "gpu (" in said and "--steps: Of an owner" in said and "[gpt2-public]" in said
