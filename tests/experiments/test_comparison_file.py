"""Odd YAMLs of `hf-fedmoe compare`: each ends with one line, before anything is trained."""

import pytest

from hf_fedmoe.cli import main
from hf_fedmoe.experiments import ImageExperiment, read_words
from hf_fedmoe.experiments.comparison import read_comparison
from hf_fedmoe.experiments.run_comparison import plan_runs
from hf_fedmoe.experiments.runs import try_out


DIGITS = """kind: images
seeds: [0, 1]
settings:
  dataset: [digits]
  model: [small_cnn]
  model_config: {channels: [2], kernel_size: 3, padding: 1, hidden_size: 8}
  image_size: 8
  partition: dirichlet
  num_clients: 6
  clients_per_round: 2
  reserved_size: 60
  validation_size: 60
  max_train_examples: 400
  max_test_examples: 40
  rounds: 2
  learning_rate: 1.0e-3
  use_cpu: true
methods:
  FedAvg: fedavg
"""


def written(tmp_path, *changes):
    """The YAML with `(old, new)` for each change, or with lines at its end."""
    text = DIGITS
    for change in changes:
        if isinstance(change, str):
            text += change + "\n"
        else:
            assert change[0] in text
            text = text.replace(*change)
    path = tmp_path / "digits.yaml"
    path.write_text(text)
    return path


def planned(path, size=None, *words):
    comparison = read_comparison(path)
    size = size or next(iter(comparison.sizes), None)
    return plan_runs(comparison, path.parent, path.parent / "out", size, read_words(list(words)))


def rows(text):
    return "FedAvg: fedavg\n", text + "\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("column: [accuracy]", "digits.yaml has 'column': is it columns?"),
        (("kind: images\n", ""), "digits.yaml has no 'kind'"),
        (("kind: images", "kind: sounds"), "`kind` is 'sounds': choose one of 'texts', 'images'"),
        (
            ("kind: images", "kind: texts"),
            "`kind` is 'texts', which has no setting 'model_config': it is one of",
        ),
        (("  FedAvg: fedavg\n", ""), "digits.yaml has no 'methods'"),
        (("  FedAvg: fedavg", "  - fedavg"), "`methods` is ['fedavg']: write lines like `name: value`"),
        (rows("fedavg:"), "The row 'fedavg' has no method: choose from afl"),
        (rows("FedAvg: {mu: 1}"), "The row 'FedAvg' has no `method`: is it fedavg"),
        (rows("FedAvg: 3"), "`methods: FedAvg` is 3: write lines like `method: NAME`"),
        (rows("FedAvg: fedsgd"), "There is no method 'fedsgd': is it fedavg or fedyogi or fedjets? There are afl"),
        (rows("P: {method: fedprox, nu: 1}"), "The row 'P': 'fedprox' has no setting 'nu': its own are mu."),
        (rows("P: {method: fedavg, mu: 1}"), "The row 'P': 'fedavg' has no setting 'mu', which is one of fedprox."),
        (rows("P: {method: fedprox, mu: -1}"), "The row 'P': `mu` is -1.0: the proximal term needs"),
        (rows("P: {method: fedprox, mu: .nan}"), "The row 'P': `mu` is nan: give a finite number"),
        (rows("P: {method: fedprox, mu: big}"), "The row 'P': `mu` is 'big': give a number"),
        (rows("P: {method: fedrolex, capacities: half}"), "The row 'P': `capacities` is 'half': give a number"),
        (rows("P: {method: fedavg_moving_average, rate: 2}"), "The row 'P': `rate` is 2.0: a moving average needs"),
        (rows("P: {method: fedavg_reserved, batch_size: 0}"), "The row 'P': `batch_size` is 0: give at least 1"),
        (rows("P: {method: fedavg, round: 1}"), "The row 'P': There is no setting 'round': is it rounds?"),
        (rows("'..': fedavg"), "`methods` has a row '..', which names no folder"),
        (rows("'/': fedavg"), "`methods` has a row '/', which names no folder"),
        (rows("'': fedavg"), "`methods` has a row '', which names no folder"),
        (rows("x" * 300 + ": fedavg"), "too long to name a folder: shorten it"),
        (rows("'a|b': fedavg"), "`methods` has a row 'a|b', which breaks the table"),
        (rows('"a\\nb": fedavg'), "which breaks the table"),
        (rows("A: fedavg\n  a: fedprox"), "`methods` has rows that differ in signs or case only, 'A' and 'a'"),
        (rows("Fed MoE: fedavg\n  Fed-MoE: fedprox"), "rows that differ in signs or case only"),
        (rows("A: fedavg\n  A: fedprox"), "digits.yaml, line 20: 'A' stands twice"),
        (("[0, 1]", "0"), "`seeds` is 0: give a list of whole numbers"),
        (("[0, 1]", "[]"), "`seeds` is []: give a list of whole numbers"),
        (("[0, 1]", "[0, 0]"), "`seeds` has 0 twice, whose runs would be the same"),
        (("[0, 1]", "[-1]"), "`seeds` has -1: give whole numbers from 0"),
        (("[0, 1]", "[0.5]"), "`seeds` has 0.5: give whole numbers from 0"),
        (("[0, 1]", "[true]"), "`seeds` has True: give whole numbers from 0"),
        (("[0, 1]", "[one]"), "`seeds` has 'one': give whole numbers from 0"),
        ("columns: [accuracyy]", "`columns` has 'accuracyy', which no row will have: is it accuracy? There are"),
        ("columns: [clients_worst]", "Clients are tested with a `client_test_share`"),
        ("columns: [dense_accuracy]", "`columns` has 'dense_accuracy', which no row will have"),
        ("columns: accuracy", "`columns` is 'accuracy': give a list of names"),
        ("columns: []", "`columns` is []: give at least one metric"),
        ("parts: [main_expert]", "`parts` has 'main_expert', which no row will have"),
        ("reference: Fed-MoE", "digits.yaml names a row 'Fed-MoE': `methods` has FedAvg"),
        ("published: {FedMix: 1}", "digits.yaml names a row 'FedMix'"),
        ("published: [1]", "`published` is [1]: write lines"),
        ("recipe: 3", "`recipe` is 3: give a text"),
        ("recipe: digit.yaml", "`recipe` of digits.yaml is 'digit.yaml', a path from that file's folder. There is no"),
        ("sizes: [tiny]", "`sizes` is ['tiny']: write lines"),
        ("sizes: {tiny: 3}", "`sizes: tiny` is 3: write lines"),
        ("sizes: {tiny: {round: 3}}", "There is no setting 'round': is it rounds?"),
        ("sizes: {tiny: {recipe_preset: quick}}", "`recipe_preset` is 'quick', but the comparison names no `recipe`"),
        ("sizes: {tiny: {methods: {X: {rounds: 1}}}}", "digits.yaml names a row 'X'"),
        ("sizes: {tiny: {methods: {FedAvg: 3}}}", "`sizes: tiny: methods: FedAvg` is 3: write lines"),
        (("rounds: 2", "seed: 3"), "`settings` has 'seed', which has no effect in a comparison: give `seeds`."),
        (("rounds: 2", "output_dir: x"), "`settings` has 'output_dir', which has no effect"),
        (("rounds: 2", "method_settings: {fedprox: {mu: 1}}"), "give a method's own settings in its row"),
        (rows("A: {method: fedavg, seed: 3}"), "`methods: A` has 'seed', which has no effect"),
        (("rounds: 2", "rounds: two"), "`rounds` is 'two': give a whole number"),
        (("rounds: 2", "rounds: 0"), "The row 'FedAvg': `rounds` is 0: give at least 1"),
        (("rounds: 2", "logging_strategy: no"), "`logging_strategy` is no, but the table counts what rounds log"),
        (("rounds: 2", "logging_steps: 50"), "`logging_steps` is 50.0, but the table counts"),
        (("1.0e-3", ".nan"), "`learning_rate` is nan: give a finite number"),
        (("reserved_size: 60", "reserved_size: -1"), "`reserved_size` is -1: give at least 0"),
        (("dataset: [digits]\n", "max_length: 3\n"), "`kind` is 'images', which has no setting 'max_length'"),
        (("  dataset: [digits]\n", ""), "There is no 'dataset' among the settings"),
    ],
)
def test_odd_yamls_end_with_one_line(change, message, tmp_path, capsys):
    path = written(tmp_path, change)
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(path), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("hf-fedmoe: ") and said.count("\n") == 1
    assert message in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--size", "huge"], "`size` is 'huge': this comparison has one size only"),
        (["--rows", "fedsgd"], "There is no row 'fedsgd': digits.yaml has 'FedAvg'"),
        (["--seeds", "0", "0"], "`seeds` has 0 twice"),
        (["--seeds", "-1"], "`seeds` has -1"),
        (["--seeds", "one"], "argument --seeds: invalid int value: 'one'"),
        (["--jobs", "0"], "`--jobs` is 0: give at least 1"),
        (["rounds"], "'rounds' follows no setting: write --name value"),
        (["--rounds"], "`rounds` is True: give a whole number"),
        (["--sizes", "huge"], "There is no setting 'sizes': is it size"),
        (["--seed", "3"], "The command line has 'seed', which has no effect in a comparison: give `seeds`"),
        (["--partition=sorted"], "`partition` is 'sorted'"),
        (["--out", "digits.yaml/out"], "`--out` is 'digits.yaml/out', where nothing can be written (Not a directory)"),
        (["--out", "digits.yaml"], "`--out` is 'digits.yaml', where nothing can be written (File exists)"),
    ],
)
def test_odd_command_lines_end_with_one_line(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["compare", "digits.yaml", *words])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and message in said


def test_numbers_may_be_written_as_people_write_them(tmp_path):
    sizes = "sizes: {tiny: {weight_decay: 1e-2, methods: {P: {mu: 1e-1, rounds: '3'}}}}"
    path = written(
        tmp_path, rows("P: {method: fedprox, mu: 5e-1}\n  no: fedavg\n  1: fedavg"), ("1.0e-3", "'1e-3'"), sizes
    )
    runs = planned(path, None, "--gate_learning_rate", "1e-4")
    assert list(runs) == ["P", "no", "1"]
    run = runs["P"][0]
    assert run.settings["method_settings"] == {"fedprox": {"mu": 0.1}} and run.settings["rounds"] == 3
    args = run.parse()[1]
    assert (args.learning_rate, args.weight_decay, args.gate_learning_rate, args.rounds) == (1e-3, 1e-2, 1e-4, 3)


def test_empty_blocks_are_as_if_left_out(tmp_path):
    path = written(tmp_path, "recipe:\npublished:\ncolumns:\nsizes: {tiny: }")
    assert read_comparison(path).columns == ["accuracy", "macro_f1"] and list(planned(path)) == ["FedAvg"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("[digits]", "[nosuch]"), "FedAvg, seed 0: None of the data sets could be loaded. No dataset 'nosuch'"),
        (("[small_cnn]", "[small_cn]"), "FedAvg, seed 0: There is no model 'small_cn': .* is it small_cnn"),
        (("channels:", "chanels:"), "`model_config` has 'chanels', which the .*'small_cnn' has not: is it channels"),
        (("[2]", "2"), "`model_config` is .*, with which a 'small_cnn' cannot be built: ValueError: `channels` is 2"),
        (
            ("partition: dirichlet", "partition: natural"),
            "seed 0: `client_column` is 'writer_id', but the data",
        ),
        (("partition: dirichlet", "partition: pachinko"), "FedAvg, seed 0: `coarse_column` is 'coarse_label', but"),
        (("clients_per_round: 2", "clients_per_round: 9"), "`clients_per_round` is 9, but there are 6 clients"),
        (rows("A: fedavg\n  B: {method: fedmoe, num_main_experts: 0}"), "B, seed 0: `gate` is 'main_features'"),
        (rows("A: fedavg\n  B: {method: pfedmoe, client_models: []}"), "B, seed 0: `client_models` is empty"),
        (
            rows("A: fedavg\n  B: {method: pfedmoe, client_models: small}"),
            r"B, seed 0: `client_models` is \['small'\]: give a list of what differs",
        ),
        (rows("A: fedavg\n  B: {method: fedavg, num_clients: 400}"), "B, seed 0: .*400 clients"),
    ],
)
def test_what_data_and_models_forbid_is_said_before_the_first_row_trains(change, message, tmp_path):
    runs = planned(written(tmp_path, change))
    with pytest.raises(ValueError, match=message):
        try_out([run for row in runs.values() for run in row])
    assert not (tmp_path / "out").exists()


def test_clients_are_divided_for_every_seed_before_the_first_row_trains(tmp_path, monkeypatch):
    runs = planned(written(tmp_path, rows("A: fedavg\n  B: fedjets\n  m: majority_class")))
    divided = []
    divide = ImageExperiment.divide
    monkeypatch.setattr(
        ImageExperiment, "divide", lambda self, rows, seed: divided.append(seed) or divide(self, rows, seed)
    )
    # FedJETs trains its common expert when it is made, but not when it is only tried out.
    monkeypatch.setattr("hf_fedmoe.training.FederatedTrainer.train", None)
    try_out([run for row in runs.values() for run in row])
    assert sorted(divided) == [0, 1]
