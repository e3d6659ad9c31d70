"""`hf-fedmoe compare` with `kind: language`, on a tiny base and texts of half-known words."""

import csv
import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from hf_fedmoe import FedMoEForCausalLM
from hf_fedmoe.cli import main
from hf_fedmoe.experiments import LanguageExperiment, compare, parse_settings
from hf_fedmoe.experiments.comparison import KINDS, read_comparison
from hf_fedmoe.experiments.language_methods import language_methods, make_language_trainer
from hf_fedmoe.experiments.language_scores import bits_per_byte, log_likelihoods, single_ways, ways_of
from hf_fedmoe.experiments.methods import train_or_go_on
from hf_fedmoe.experiments.owner_texts import read_owner_texts
from hf_fedmoe.experiments.run_comparison import plan_runs
from hf_fedmoe.experiments.runs import execute, try_out
from hf_fedmoe.owners import pack
from tests.tiny_decoders import tiny_decoder
from tests.tiny_owners import save_base, text_of
from tests.tiny_tokenizer import tiny_tokenizer


OWNERS = ["court", "press"]
SETTINGS = {
    "dataset": ["texts.parquet"],
    "model": ["base"],
    "owners": OWNERS,
    "public": "open",
    "unseen": ["films"],
    "opt_out": "press",
    "sequence_length": 16,
    "rows_per_owner": 16,
    "test_size": 5,
    "rank": 4,
    "rounds": 1,
    "num_train_epochs": 4,
    "clients_per_round": 2,
    "per_device_train_batch_size": 8,
    "learning_rate": 0.05,
    "use_cpu": True,
}
LANGUAGE = KINDS["language"]


def part_of(owner, split):
    """A third of what an owner has, with the owner's own words in all of them."""
    words, start = text_of(owner, 1200).split(), 400 * ("train", "reserved", "test").index(split)
    return " ".join(words[start : start + 400])


def rows_of(owner):
    """The rows that are reported on, and their bytes."""
    ids = torch.tensor(pack(tiny_tokenizer(), [part_of(owner, "test")], 16)[:5])
    return ids, sum(len(text.encode()) for text in tiny_tokenizer().batch_decode(ids[:, 1:], skip_special_tokens=True))


@pytest.fixture
def place(tmp_path, monkeypatch):
    save_base(tmp_path / "base")
    rows = []
    for owner in (*OWNERS, "open", "films"):
        for split in ("train", "reserved", "test"):
            rows.append({"owner": owner, "split": split, "text": part_of(owner, split)})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "texts.parquet")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(place, methods, **changes):
    given = {"kind": "language", "seeds": [0], "settings": SETTINGS, "methods": methods, **changes}
    (place / "owners.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
    return place / "owners.yaml"


def runs_of(path, out, **overrides):
    return plan_runs(read_comparison(path), path.parent, out, None, overrides)


def metrics_of(run):
    return json.loads(run.result_file.read_text())["metrics"]


def test_figures_are_those_of_the_models(place):
    rows = {"base": "base", "local": "local", "fedavg": "fedavg", "pooled": "pooled", "owners": "owners"}
    runs = {row: run for row, (run,) in runs_of(written(place, rows), place / "out").items()}
    for run in runs.values():
        execute(run)
    found = {row: metrics_of(run) for row, run in runs.items()}
    # What `columns` may name is what there will be.
    for row, run in runs.items():
        assert set(found[row]) == set(LANGUAGE.metrics(run.method, run.parse()[0]))

    ids, count = rows_of("press")
    with torch.no_grad():
        loss = tiny_decoder("gpt2").eval()(input_ids=ids, labels=ids).loss.item()
    of_base = found["base"]
    assert of_base["bits_per_byte_press"] == pytest.approx(loss * 5 * 15 / math.log(2) / count, rel=1e-5)
    assert of_base["perplexity_press"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert of_base["bits_per_byte"] == (of_base["bits_per_byte_court"] + of_base["bits_per_byte_press"]) / 2
    assert of_base["perplexity"] == pytest.approx(math.sqrt(of_base["perplexity_court"] * of_base["perplexity_press"]))
    # Who is alone leaves the server its start, and in one round becomes the owner's expert.
    names = [name for name in of_base if name != "tokens_per_second"]
    assert [found["local"][name] for name in names] == [of_base[name] for name in names]
    owners = found["owners"]
    assert found["local"]["clients_bits_per_byte"] == pytest.approx(owners["oracle_expert_bits_per_byte"], rel=1e-4)
    assert owners["clients_bits_per_byte"] == pytest.approx(owners["oracle_expert_bits_per_byte"], rel=1e-4)
    assert owners["oracle_expert_bits_per_byte"] < of_base["bits_per_byte"]
    experts = {name: owners[f"expert_{name}_bits_per_byte"] for name in OWNERS}
    assert owners["best_expert_of_test_bits_per_byte"] == min(experts.values())
    assert owners["expert_court_bits_per_byte_court"] == owners["oracle_expert_bits_per_byte_court"]
    assert found["fedavg"]["clients_bits_per_byte"] == found["fedavg"]["bits_per_byte"] < of_base["bits_per_byte"]
    assert found["pooled"]["bits_per_byte"] < of_base["bits_per_byte"]
    assert found["local"]["megabytes_up"] == 0 < found["fedavg"]["megabytes_up"] < owners["megabytes_up"]


def test_parts_are_the_figures_of_ways_to_use_the_experts(place):
    path = written(place, {"owners": "owners"})
    ((run,),) = runs_of(path, place / "out").values()
    execute(run)
    found = metrics_of(run)
    experiment, args = run.parse()
    args.output_dir = str(place / "again")
    tokenizer = experiment.load_processor()
    _, data = experiment.load_data(tokenizer, run.seed)
    trainer = make_language_trainer("owners", experiment, args, data)
    train_or_go_on(trainer)
    mixture = trainer.model
    assert isinstance(mixture, FedMoEForCausalLM)
    for domain in experiment.domains:
        ids, count = rows_of(domain)
        ways = ways_of(mixture, single_ways(mixture, OWNERS))
        for name, row in {
            "": "mixture, soft",
            "top_1_": "mixture, top-1",
            "soup_": "soup",
            "uniform_ensemble_": "uniform ensemble",
            "likelihood_router_": "likelihood router",
            "mixture_or_base_": "mixture or base by likelihood",
            "likelihood_weights_": "mixture, weights by likelihood",
            "expert_press_": "press",
        }.items():
            assert found[f"{name}bits_per_byte_{domain}"] == bits_per_byte(ways[row](ids), count)
        weights = mixture.route_by_likelihood(ids)
        told = log_likelihoods(mixture, ids, expert_weights=weights)
        assert found[f"likelihood_weights_bits_per_byte_{domain}"] == pytest.approx(bits_per_byte(told, count))
        assert found[f"likelihood_weights_bits_per_byte_{domain}"] != found[f"bits_per_byte_{domain}"]
        with torch.no_grad():
            logits = mixture.without("press")(input_ids=ids).logits[:, :-1].log_softmax(-1)
        told = logits.gather(-1, ids[:, 1:, None])[..., 0]
        assert found[f"without_press_bits_per_byte_{domain}"] == pytest.approx(bits_per_byte(told, count), rel=1e-5)


def test_the_best_expert_is_chosen_without_the_text_that_is_reported_on(place):
    """It is the one that is best on the owners' reserved rows; here a test of other words would choose another."""
    swapped = pq.read_table("texts.parquet").to_pylist()
    for row in swapped:
        if row["split"] == "test" and row["owner"] == "press":
            row["text"] = part_of("court", "reserved")
        if row["split"] == "reserved" and row["owner"] == "court":
            row["text"] = part_of("press", "test")
    pq.write_table(pa.Table.from_pylist(swapped), "swapped.parquet")
    settings = SETTINGS | {"dataset": ["swapped.parquet"], "validation_size": 4}
    (run,) = runs_of(written(place, {"owners": "owners"}, settings=settings), place / "out")["owners"]
    execute(run)
    found = metrics_of(run)
    assert set(found) == set(LANGUAGE.metrics("owners", run.parse()[0]))
    assert found["expert_court_bits_per_byte"] < found["expert_press_bits_per_byte"]
    for name in ("bits_per_byte", "bits_per_byte_films", "perplexity"):
        assert found[f"best_expert_{name}"] == found[f"expert_press_{name}"]
        assert found[f"best_expert_of_test_{name}"] == found[f"expert_court_{name}"]


def test_rows_that_rounds_are_watched_on_are_not_reported_on(place):
    for part, reported in (("reserved", 5), ("test", 0)):
        given = SETTINGS | {"part": part, "validation_size": 3}
        experiment, _ = parse_settings(LanguageExperiment, given, {"output_dir": "unused"})
        _, source = experiment.source()
        data, rows = experiment.split(source, 0), slice(reported, reported + 3)
        assert data.validation["input_ids"][:] == [row for name in OWNERS for row in source[name]["reserved"][rows]]
        assert data.test["input_ids"][:5] == source["court"][part][:5]


def test_table_page_and_curves_say_that_lower_is_better(place, warm_processes):
    columns = ["bits_per_byte", "bits_per_byte_films", "perplexity", "tokens_per_second", "clients_bits_per_byte"]
    settings = SETTINGS | {"validation_size": 3, "eval_strategy": "steps", "eval_steps": 1}
    path = written(
        place,
        {
            "Base": "base",
            "FedAvg": {"method": "fedavg", "lora_fusion": "factors"},
            "Mixture": "owners",
            "Pooled": "pooled",
        },
        columns=columns,
        parts=["top_1", "without_press"],
        reference="FedAvg",
        settings=settings,
    )
    out = place / "out"
    table = compare(path, out)
    head, _, base, fedavg, mixture, top_1, without, pooled = table.split("\n")
    assert head == (
        "| | bits per byte | films | perplexity | tokens a second | each owner by its own model | "
        "FedAvg below, of seeds |"
    )
    assert base.startswith("| Base | ") and base.endswith(" |  | 1 / 1 |") and fedavg.endswith(" |  |")
    assert top_1.startswith("| — top 1 | ") and without.startswith("| — without press | ")
    with (out / "results.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert fedavg.split(" | ")[1] == f"{float(rows['FedAvg']['bits_per_byte']):.3f}"  # no per cent
    assert pooled.split(" | ")[5] == ""  # who has pooled has no client of its own
    won = float(rows["FedAvg"]["bits_per_byte"]) < float(rows["Mixture"]["bits_per_byte"])
    assert mixture.endswith(f" | {int(won)} / 1 |")
    assert "FedAvg below, of seeds" in (out / "comparison.html").read_text()
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG" and not (out / "clients.png").exists()
    result = out / "fedavg" / "seed-0" / "result.json"
    ((step, value),) = json.loads(result.read_text())["curve"]
    assert step == 1 and 0 < value < float(rows["Base"]["bits_per_byte"])
    # Finished runs are only read.
    before = result.stat().st_mtime_ns
    assert compare(path, out) == table and result.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="a finished run with another rank: choose another `--out`"):
        compare(path, out, overrides={"rank": 2})


def test_help_says_where_an_example_is(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "the YAML, of classifiers or of language models; recipes/paper and recipes/language have examples" in said


def test_the_recipe_is_sound(tmp_path):
    path = Path(__file__).parents[2] / "recipes" / "language" / "owners.yaml"
    comparison = read_comparison(path)
    runs = plan_runs(comparison, path.parent, tmp_path)
    experiment, args = runs["Mixture of owners"][0].parse()
    parts = LANGUAGE.part_names("owners", experiment)
    assert set(comparison.parts) <= set(parts) and comparison.seeds == [0, 1, 2]
    # All see as many tokens of each owner: 40 steps of 8 rows.
    for row_runs in runs.values():
        _, args = row_runs[0].parse()
        assert args.rounds * args.num_train_epochs * experiment.rows_per_owner == pytest.approx(320)
        assert args.per_device_train_batch_size == 8


def test_every_method_can_be_made(place):
    runs = runs_of(written(place, {method: method for method in ("base", *language_methods())}), place / "out")
    try_out([run for (run,) in runs.values()])
    for name in ("fedprox", "scaffold", "apfl", "fedavg_plus", "clustered", "owners", "pooled"):
        assert name in runs


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("fedmoe", "which has no 'fedmoe', for it trains a gate and experts by the classes of rows: take `owners`"),
        ("fedavg_tuned_at_end", "for its server trains on reserved rows by their classes: take `fedavg`, or `pooled`"),
        ("fedrep", "for it keeps a classifier's head with the clients: take `local` or `fedavg_plus`"),
        ("heterofl", "for it cuts whole models, and clients train adapters here: take `fedavg` with `client_ranks`"),
        ("fedem", "for it trains several classifiers, weighed by classes: take `owners`"),
        ("majority_class", "for text has no classes: take `base`, which trains nothing either"),
        ("fedavgg", "There is no method 'fedavgg': is it fedavg"),
    ],
)
def test_methods_of_classes_are_refused_by_name(place, method, message):
    for methods in ({"row": method}, {method: {"rounds": 2}}):
        with pytest.raises(ValueError, match=message if "There" not in message or "row" in methods else "fedavgg"):
            read_comparison(written(place, methods))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"owners": []}, r"`owners` is \[\]: name those of the texts who are clients"),
        ({"opt_out": "films"}, "`opt_out` is 'films': choose one of the owners"),
        ({"unseen": ["court"]}, "'court' is twice among `owners`, `public` and `unseen`"),
        ({"part": "train"}, "`part` is 'train'"),
        ({"clients_per_round": 3}, "`clients_per_round` is 3, but there are 2 `owners`"),
        ({"num_routed_experts": 3}, "`kind` is 'language', which has no setting 'num_routed_experts'"),
        ({"eval_strategy": "steps"}, "`validation_size` is 0, but `eval_strategy` is 'steps'"),
        ({"test_size": 0}, "`test_size` is 0: give at least 1"),
    ],
)
def test_wrong_settings_are_told_before_anything_is_read(place, changes, message):
    with pytest.raises(ValueError, match=message):
        runs_of(written(place, {"fedavg": "fedavg"}, settings=SETTINGS | changes), place / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": ["none.parquet"]}, "`dataset` is 'none.parquet', which cannot be read"),
        ({"unseen": ["tweets"]}, "`dataset` is 'texts.parquet', which has no test text of 'tweets'"),
        ({"rows_per_owner": 900}, "`rows_per_owner` is 900, but 'court' has .* rows of `sequence_length` = 16"),
        (
            {"validation_size": 99},
            "`validation_size` is 99, but 'court' has .* reserved rows of `sequence_length` = 16: ",
        ),
        (
            {"part": "reserved", "validation_size": 99},
            "but 'court' has .* reserved rows of .* 16, of which `test_size` = 5 are reported on: lower it",
        ),
        ({"sequence_length": 2000}, "The train text of 'court': `text` has .* tokens, and `sequence_length` is 2000"),
        ({"sequence_length": 200, "rows_per_owner": 1}, "`sequence_length` is 200, but the base reads"),
    ],
)
def test_what_the_texts_and_the_base_have_not_is_told_before_training(place, changes, message):
    runs = runs_of(written(place, {"fedavg": "fedavg"}, settings=SETTINGS | changes), place / "out")
    with pytest.raises(ValueError, match=message):
        try_out(runs["fedavg"])


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("text", None, "`dataset` is 'texts.parquet', whose row 1 has None as 'text': write texts only"),
        ("owner", None, "`dataset` is 'texts.parquet', whose row 1 has None as 'owner': write texts only"),
    ],
)
def test_rows_that_are_no_texts_are_named(place, column, value, message):
    rows = pq.read_table("texts.parquet").to_pylist()
    rows[1][column] = value
    pq.write_table(pa.Table.from_pylist(rows), "texts.parquet")
    with pytest.raises(ValueError, match=message):
        read_owner_texts("texts.parquet", {"court": ["train"]}, "dataset")
    pq.write_table(pa.table({"owner": [1], "split": ["train"], "text": ["words"]}), "texts.parquet")
    with pytest.raises(ValueError, match="whose row 0 has 1 as 'owner'"):
        read_owner_texts("texts.parquet", {"1": ["train"]}, "dataset")


def test_a_reference_that_has_not_what_is_counted_is_told_before_training(place):
    columns = ["clients_bits_per_byte", "bits_per_byte"]
    for reference, fits in (("base", False), ("pooled", False), ("local", True)):
        path = written(
            place, {name: name for name in ("base", "pooled", "local")}, columns=columns, reference=reference
        )
        if fits:
            assert len(runs_of(path, place / "out")) == 3
            continue
        with pytest.raises(ValueError, match=f"`reference` is '{reference}', which has no 'clients_bits_per_byte'"):
            runs_of(path, place / "out")


def test_the_best_expert_needs_rows_to_be_chosen_by(place):
    path = written(place, {"owners": "owners"}, parts=["best_expert"])
    with pytest.raises(ValueError, match=r"`parts` has 'best_expert', .* chosen by the rows of a `validation_size`"):
        runs_of(path, place / "out")


def test_owners_draw_rows_by_the_seed(place):
    experiment, _ = parse_settings(LanguageExperiment, SETTINGS, {"output_dir": "unused"})
    _, source = experiment.source()
    first, again, other = (experiment.split(source, seed) for seed in (0, 0, 1))
    assert first.client_names == OWNERS and [len(rows) for rows in first.client_indices] == [16, 16]
    rows = [data.client("court")["input_ids"][:] for data in (first, again, other)]
    assert rows[0] == rows[1] != rows[2]
    assert first.test["domain"][:] == [name for name in experiment.domains for _ in range(5)]
    assert first.test["input_ids"][:] == other.test["input_ids"][:]
    assert first.reserved["input_ids"][:] == source["open"]["train"]
