"""Owners' experts from text to a mixture and out of it again, as folders."""

import filecmp
import json
import math
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_fedmoe import FedMoEForCausalLM, TextStatistics
from hf_fedmoe.cli import main
from hf_fedmoe.models import base_sha256, text_statistics
from hf_fedmoe.owners import (
    default_arguments,
    merge_experts,
    pack,
    read_rows,
    read_texts,
    remove_owner,
    train_expert,
)
from tests.tiny_owners import save_base, text_of
from tests.tiny_tokenizer import tiny_tokenizer


OWNERS = ("court", "press", "code")
PLAIN = {"lora_rank": 4, "sequence_length": 16}


def arguments(folder: Path, **settings):
    settings = {"max_steps": 4, "learning_rate": 0.05, "use_cpu": True, "disable_tqdm": True} | settings
    return default_arguments(folder, **settings)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base and three owners' experts, made once."""
    place = tmp_path_factory.mktemp("owners")
    save_base(place / "base")
    (place / "public.txt").write_text(text_of("public"))
    for name in OWNERS:
        (place / f"{name}.txt").write_text(text_of(name))
        args = arguments(place / name)
        facts = train_expert(
            name, place / "base", place / f"{name}.txt", place / name, licence=f"of {name}", args=args, **PLAIN
        )
        assert facts.tokens == 400 and facts.steps == 4
    merge_experts(
        place / "base", [place / name for name in OWNERS], place / "all", place / "public.txt", sequence_length=16
    )
    return place


def same_files(one: Path, other: Path) -> bool:
    names = sorted(os.listdir(one))
    return names == sorted(os.listdir(other)) and filecmp.cmpfiles(one, other, names, shallow=False)[0] == names


def test_training_twice_gives_the_same_files(place, tmp_path):
    train_expert(
        "press",
        place / "base",
        place / "press.txt",
        tmp_path / "press",
        licence="of press",
        args=arguments(tmp_path / "press"),
        **PLAIN,
    )
    assert same_files(place / "press", tmp_path / "press")
    other = arguments(tmp_path / "other", seed=1)
    train_expert("press", place / "base", place / "press.txt", tmp_path / "other", args=other, **PLAIN)
    ours, theirs = (
        load_file(folder / "adapter_model.safetensors") for folder in (place / "press", tmp_path / "other")
    )
    assert ours.keys() == theirs.keys() and not any(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_expert_knows_its_text_better_than_the_base(place):
    mixture = FedMoEForCausalLM.from_pretrained(place / "all")
    rows = torch.tensor(pack(tiny_tokenizer(), [text_of("code")], 16))
    with torch.no_grad():
        losses = [mixture(input_ids=rows, labels=rows, expert=expert).loss for expert in ("code", "base")]
    assert losses[0] < losses[1]


def test_sums_are_those_of_the_text_and_of_the_base(place):
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    rows = pack(tiny_tokenizer(), [text_of("court")], 16)
    found = TextStatistics.load(place / "court" / "statistics.safetensors")
    assert torch.equal(found.gram_DD, text_statistics(base.get_input_embeddings(), rows).gram_DD)
    assert found.base_sha256 == base_sha256(base) and found.count == 25 * 3


def test_a_mixture_of_folders_is_one_made_by_hand(place):
    by_hand = FedMoEForCausalLM.from_base(place / "base", lora_rank=4, lora_alpha=8)
    for name in OWNERS:
        sums = place / name / "statistics.safetensors"
        by_hand = by_hand.add_owner(place / name, sums, name=name, licence=f"of {name}", tokens=400)
    public = pack(tiny_tokenizer(), [text_of("public")], 16)
    by_hand.set_statistics("base", text_statistics(by_hand.get_input_embeddings(), public))
    found = FedMoEForCausalLM.from_pretrained(place / "all")
    assert found.config.owners == by_hand.config.owners and found.config.router_names == by_hand.config.router_names
    ours, theirs = found.state_dict(), by_hand.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_removed_owner_never_was_there(place, tmp_path):
    remove_owner(place / "all", "press", tmp_path / "fewer")
    merge_experts(
        place / "base", [place / "court", place / "code"], tmp_path / "two", place / "public.txt", sequence_length=16
    )
    assert same_files(tmp_path / "fewer", tmp_path / "two")
    assert "of press" in (place / "all" / "README.md").read_text()
    assert "press" not in (tmp_path / "fewer" / "README.md").read_text()


def test_experts_that_do_not_fit_are_refused_by_name(place, tmp_path):
    args = {"base": place / "base", "text": place / "code.txt", "sequence_length": 16}
    out = tmp_path / "mixture"
    # Another base, another rank, another alpha, other layers.
    save_base(tmp_path / "base", seed=1)
    elsewhere = args | {"base": tmp_path / "base"}
    for folder, changed, message in (
        (
            "elsewhere",
            elsewhere | {"lora_rank": 4},
            r"`base_sha256` '\w+', but .* has '\w+': name the base",
        ),
        ("rank", args | {"lora_rank": 2}, "with `r` 2, where .* has 4"),
        ("alpha", args | {"lora_rank": 4, "lora_alpha": 4.0}, r"with `lora_alpha` 4.0, where .* has 8"),
        ("layers", args | {"lora_rank": 4, "target_modules": ["c_fc"]}, "with `layers` 2 layers .* has 4 layers"),
    ):
        train_expert(name="code", out=tmp_path / folder, args=arguments(tmp_path / folder, max_steps=1), **changed)
        with pytest.raises(ValueError, match=f"`experts` has '.*{folder}' .*{message}"):
            merge_experts(place / "base", [place / "court", tmp_path / folder], out)
    with pytest.raises(ValueError, match=r"`experts` has '.*court': `owners\[1\]` is named 'court', which is taken"):
        merge_experts(place / "base", [place / "court", place / "court"], out)
    shutil.copytree(place / "code", tmp_path / "incomplete")
    sums = tmp_path / "incomplete" / "statistics.safetensors"
    save_file(load_file(sums), sums)
    with pytest.raises(ValueError, match="incomplete' of a base with `base_sha256` None"):
        merge_experts(place / "base", [place / "court", tmp_path / "incomplete"], out)
    sums.unlink()
    with pytest.raises(ValueError, match=r"incomplete' without 'statistics\.safetensors'"):
        merge_experts(place / "base", [place / "court", tmp_path / "incomplete"], out)
    assert not out.exists()


def test_what_cannot_be_trained_is_refused_before(place, tmp_path):
    (tmp_path / "short.txt").write_text("w3 w4")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").mkdir()
    pq.write_table(pa.table({"body": ["w3"], "size": [1]}), tmp_path / "rows.parquet")
    for changed, message in (
        ({"text": tmp_path / "none.txt"}, r"`text` is '.*none.txt', which is not there"),
        ({"text": tmp_path / "short.txt"}, "`text` has 2 tokens, and `sequence_length` is 16"),
        ({"text": tmp_path / "binary"}, "binary', which is not UTF-8"),
        ({"text": tmp_path / "empty"}, "where no text is"),
        ({"text": tmp_path / "rows.parquet"}, r"without a column 'text': name one of \['body', 'size'\]"),
        ({"text": tmp_path / "rows.parquet", "text_column": "size"}, "`text_column` is 'size', which is no column"),
        ({"name": "base"}, "is named 'base', which is what the base is called"),
        ({"lora_rank": 0}, "`lora_rank` is 0"),
        ({"target_modules": ["gate"]}, r"`target_modules` is \['gate'\]"),
        ({"sequence_length": 65}, "`sequence_length` is 65"),
        ({"epsilon": 0.0}, "`epsilon` is 0.0: give a number above 0"),
        ({"args": arguments(tmp_path / "out", max_steps=0, num_train_epochs=0)}, "with which nothing is trained"),
        ({"out": place / "court"}, "court', where something is already: name a new folder"),
    ):
        given = {
            "name": "court",
            "base": place / "base",
            "text": place / "court.txt",
            "out": tmp_path / "out",
            **PLAIN,
        }
        with pytest.raises(ValueError, match=message):
            train_expert(**given | changed)
        assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
    with pytest.raises(OSError, match=r"`base` is '.*nowhere', which cannot be loaded: name a folder"):
        train_expert("court", tmp_path / "nowhere", place / "court.txt", tmp_path / "out")
    (tmp_path / "untyped").mkdir()
    (tmp_path / "untyped" / "config.json").write_text("{}")
    for name in ("no/such/name", tmp_path / "untyped"):
        with pytest.raises(OSError, match=r"`base` is '.*', which cannot be loaded: name a folder"):
            train_expert("court", name, place / "court.txt", tmp_path / "out")
    for name in (tmp_path / "nowhere", "no/such/name"):
        with pytest.raises(ValueError, match=r"`mixture` is '.*', which cannot be loaded: name a folder that"):
            remove_owner(name, "court", tmp_path / "out")


def test_answers_of_prompts_are_learned_and_files_may_be_of_both_kinds(place, tmp_path):
    rows = [{"prompt": f"w3 w{k}", "completion": f"w{k} w{k + 1} w9 w10"} for k in range(4, 20)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_rows([tmp_path / "answers.jsonl", place / "press.txt"], tiny_tokenizer(), 16)
    assert len(found) == 16 + 25 and found[0] == {
        "input_ids": [3, 4, 4, 5, 9, 10],
        "labels": [-100, -100, 4, 5, 9, 10],
    }
    assert found[-1]["labels"] == found[-1]["input_ids"]
    facts = train_expert(
        "answers",
        place / "base",
        [tmp_path / "answers.jsonl", place / "press.txt"],
        tmp_path / "answers",
        args=arguments(tmp_path / "answers"),
        **PLAIN,
    )
    assert facts.tokens == 16 * 6 + 400 and math.isfinite(facts.loss)
    (tmp_path / "broken.jsonl").write_text('{"prompt": ')
    with pytest.raises(ValueError, match=r"broken.jsonl', which is no whole file of a JSON object in each line"):
        read_rows(tmp_path / "broken.jsonl", tiny_tokenizer(), 16)
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "w3"}]}) + "\n")
    with pytest.raises(ValueError, match=r"`text` has '.*talk.jsonl': The tokenizer has no `chat_template`"):
        read_rows(tmp_path / "talk.jsonl", tiny_tokenizer(), 16)


def test_private_sums_are_told_on_the_card_and_make_a_mixture(place, tmp_path):
    args = arguments(tmp_path / "private")
    facts = train_expert(
        "private", place / "base", place / "code.txt", tmp_path / "private", epsilon=4.0, args=args, **PLAIN
    )
    assert (facts.epsilon, facts.delta) == (4.0, 1e-5)
    card = (tmp_path / "private" / "README.md").read_text()
    assert "differential privacy for each sequence (epsilon 4.0, delta 1e-05)" in card
    exact, noisy = (
        TextStatistics.load(folder / "statistics.safetensors") for folder in (place / "code", tmp_path / "private")
    )
    assert not torch.equal(exact.gram_DD, noisy.gram_DD)
    # The adapter is not private.
    assert filecmp.cmp(
        place / "code" / "adapter_model.safetensors", tmp_path / "private" / "adapter_model.safetensors", shallow=False
    )
    merge_experts(place / "base", [tmp_path / "private", place / "court"], tmp_path / "mixture")


def test_sums_and_cards_that_cannot_be_are_refused(place, tmp_path):
    shutil.copytree(place / "court", tmp_path / "court")
    sums, card = tmp_path / "court" / "statistics.safetensors", tmp_path / "court" / "README.md"
    honest, told = TextStatistics.load(sums), card.read_text()
    capturing = honest.gram_DD.clone()
    capturing[:-1, :-1] *= 1e6
    TextStatistics(capturing, honest.base_sha256).save(sums)
    with pytest.raises(ValueError, match=r"court': `statistics` of 'court' are none of a text: .*mean square"):
        merge_experts(place / "base", [tmp_path / "court", place / "press"], tmp_path / "out")
    TextStatistics(honest.gram_DD * 1000, honest.base_sha256).save(sums)
    with pytest.raises(ValueError, match=r"over 75000 features, and its card tells of 400 tokens, which have 100"):
        merge_experts(place / "base", [tmp_path / "court", place / "press"], tmp_path / "out")
    honest.save(sums)
    card.write_text(told.replace("tokens: 400", "tokens: -5"))
    with pytest.raises(ValueError, match=r"`owner.tokens` is -5 in '.*README.md': write how many there were"):
        merge_experts(place / "base", [tmp_path / "court", place / "press"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_texts_of_files_folders_and_tables(tmp_path):
    (tmp_path / "texts" / "more").mkdir(parents=True)
    (tmp_path / "texts" / "b.txt").write_text("second")
    (tmp_path / "texts" / "more" / "c.md").write_text("third")
    (tmp_path / "texts" / "a.py").write_text("\ufefffirst")
    (tmp_path / "texts" / ".hidden").write_bytes(b"\xff")
    pq.write_table(pa.table({"text": ["fourth", None, " ", "fifth"]}), tmp_path / "rows.parquet")
    assert read_texts(tmp_path / "texts") == ["first", "second", "third"]
    assert read_texts([tmp_path / "rows.parquet", str(tmp_path / "texts" / "b.txt")]) == ["fourth", "fifth", "second"]


def test_from_the_command_line(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train = ["expert", "train", "--base", str(place / "base"), "--lora_rank", "4", "--sequence_length", "16"]
    train += ["--max_steps", "4", "--learning_rate", "0.05", "--use_cpu", "--disable_tqdm"]
    for name in ("court", "code"):
        main([*train, "--name", name, "--text", str(place / f"{name}.txt"), "--out", name, "--licence", f"of {name}"])
    assert "code: an expert of code, 400 tokens, 4 steps, loss " in capsys.readouterr().out
    assert same_files(place / "code", tmp_path / "code")
    public = ["--public", str(place / "public.txt"), "--sequence_length", "16"]
    main(["expert", "merge", str(place / "base"), str(place / "press"), "court", "code", "--out", "three", *public])
    main(["expert", "remove", "three", "press", "--out", "two"])
    assert capsys.readouterr().out.splitlines()[-1] == "two: a mixture of base, court, code"
    main(["expert", "merge", str(place / "base"), "court", "code", "--out", "two-at-once", *public])
    assert same_files(tmp_path / "two", tmp_path / "two-at-once")
    for words, message in (
        (["expert", "remove", "three", "presss", "--out", "x"], "`expert` is 'presss': did you mean 'press'?"),
        (["expert", "remove", str(place / "base"), "press", "--out", "x"], "a model of type 'gpt2': name a mixture"),
        (["expert", "merge", str(place / "base"), "nobody", "--out", "x"], "`experts` has 'nobody' without"),
        (
            ["expert", "merge", str(place / "base"), "code", "--out", "x", "--rank", "3"],
            "unrecognized arguments: --rank",
        ),
        ([*train, "--name", "a", "--text", "b", "--out", "x", "--max_stepss", "3"], "is it max_steps"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(words)
        said = capsys.readouterr().err.strip()
        assert stop.value.code == 2 and message in said.splitlines()[-1], said
        assert not Path("x").exists()


def test_weights_that_became_infinite_are_not_written(place, tmp_path):
    args = arguments(tmp_path / "out", learning_rate=1e30, max_steps=2)
    with pytest.raises(ValueError, match=r"`learning_rate` is 1e\+30, with which"):
        train_expert("x", place / "base", place / "court.txt", tmp_path / "out", args=args, **PLAIN)
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("adapter_model.safetensors", b"\x80\x04K\x01."),  # a pickle of that name
        ("statistics.safetensors", b"abc"),
        ("adapter_config.json", b"{"),
        ("README.md", b"---\nowner: [\n---\n"),
        ("README.md", b"\xff\xfe---"),
    ],
)
def test_damaged_files_of_an_expert_are_told_with_its_folder(file, content, place, tmp_path):
    shutil.copytree(place / "court", tmp_path / "court")
    (tmp_path / "court" / file).write_bytes(content)
    with pytest.raises(ValueError, match=r"`experts` has '.*court', of which a file cannot be read"):
        merge_experts(place / "base", [tmp_path / "court", place / "press"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
