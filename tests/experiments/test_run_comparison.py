"""`hf-fedmoe compare` on scikit-learn's digits."""

import csv
import json
import math
import os
import signal
from types import SimpleNamespace

import pytest
import yaml

from hf_fedmoe.cli import main
from hf_fedmoe.experiments import FailedRunsError, ImageExperiment, compare, make_trainer, method_names, parse_settings
from hf_fedmoe.experiments.comparison import KINDS, read_comparison
from hf_fedmoe.experiments.folders import claim_folder
from hf_fedmoe.experiments.named_strategies import CENTRALISED
from hf_fedmoe.experiments.run_comparison import _rehearse, plan_runs, side_by_side
from hf_fedmoe.experiments.runs import execute, rehearse_run, try_out
from hf_fedmoe.experiments.side_by_side import Failure
from hf_fedmoe.federation import Federation
from hf_fedmoe.models import as_expert
from hf_fedmoe.reporting import read_client_table
from tests.tiny_federation import assert_equal_states, state


SETTINGS = {
    "dataset": ["digits"],
    "model": ["small_cnn"],
    "model_config": {"channels": [2], "kernel_size": 3, "padding": 1, "hidden_size": 8},
    "image_size": 8,
    "partition": "iid",
    "num_clients": 8,  # of which two are unseen; FedRolex has five capacities
    "clients_per_round": 2,
    "examples_per_client": 20,
    "reserved_size": 30,
    "validation_size": 20,
    "max_train_examples": 240,
    "max_test_examples": 40,
    "client_test_share": 0.25,
    "unseen_share": 0.25,
    "rounds": 2,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "use_cpu": True,
}


def written(tmp_path, **changes):
    given = {"kind": "images", "seeds": [0], "settings": SETTINGS, "methods": {"fedavg": "fedavg"}, **changes}
    path = tmp_path / "digits.yaml"
    path.write_text(yaml.safe_dump(given, sort_keys=False))
    return path


def runs_of(path, out, size=None, **overrides):
    return plan_runs(read_comparison(path), path.parent, out, size, overrides)


def test_rows_are_rehearsed_where_that_is_asked_for(tmp_path, capfd):
    (tmp_path / "out" / "_rehearsal" / "of-one-that-was-killed").mkdir(parents=True)
    rows = {"FedAvg": "fedavg", "nothing": "majority_class", "far": {"method": "fedprox", "rehearse": False}}
    path = written(tmp_path, methods=rows, seeds=[0, 1], columns=["accuracy"], settings=SETTINGS | {"rehearse": True})
    compare(path, tmp_path / "out")
    lines = [line.strip() for line in capfd.readouterr().out.splitlines()]
    takes = [line for line in lines if " takes about " in line]
    assert len(takes) == 1 and takes[0].startswith("FedAvg takes about ") and "2 rounds of" in takes[0]
    assert any(line.startswith("2 runs of these rows: about ") for line in lines)
    # Before anything trains, and nothing is left of it.
    assert (tmp_path / "out" / "_rehearsal").exists() is False
    assert lines.index(takes[0]) < min(index for index, line in enumerate(lines) if " of 6: " in line)
    assert not list((tmp_path / "out").rglob("forecast.json"))
    # What is finished is not rehearsed.
    before = (tmp_path / "out" / "fedavg" / "seed-1" / "result.json").read_text()
    compare(path, tmp_path / "out")
    assert " takes about " not in capfd.readouterr().out
    # Whether there was one makes no other run.
    written(tmp_path, methods=rows, seeds=[0, 1], columns=["accuracy"], settings=SETTINGS | {"rehearse": False})
    compare(path, tmp_path / "out", overrides={"rehearse": True})
    assert (tmp_path / "out" / "fedavg" / "seed-1" / "result.json").read_text() == before


def test_a_rehearsal_that_fails_is_told_and_stops_nothing(tmp_path):
    class Failing:
        num_processes = 2

        def run(self, function, tasks, watch):
            assert function is rehearse_run and [task.row for task in tasks] == ["fedavg"]
            yield tasks[0], Failure("RuntimeError: no memory")

    runs = runs_of(written(tmp_path, settings=SETTINGS | {"rehearse": True}), tmp_path / "out")
    told = []
    _rehearse(runs["fedavg"], Failing(), SimpleNamespace(rehearse=None, say=told.append))
    assert told == ["fedavg: no forecast, RuntimeError: no memory"]
    assert not (tmp_path / "out" / "_rehearsal").exists()


def test_rows_side_by_side_take_as_long_as_the_busiest_process():
    assert side_by_side([5.0], 4) == 5.0
    assert side_by_side([3.0, 1.0, 1.0, 2.0], 1) == 7.0
    # The second process takes the three short ones.
    assert side_by_side([3.0, 1.0, 1.0, 2.0], 2) == 4.0


def test_command_writes_tables_curves_and_figures(tmp_path, capfd):
    rows = {
        "FedAvg": "fedavg",
        "far": {"method": "fedprox", "mu": 9.0},
        "Fed-MoE": {"method": "fedmoe", "top_l": 2},
    }
    columns = ["accuracy", "clients_accuracy", "megabytes_up"]
    path = written(
        tmp_path,
        methods=rows,
        columns=columns,
        parts=["main_expert"],
        reference="Fed-MoE",
        published={"FedAvg": "1.5"},
        sizes={"tiny": {}},
        claim="1.5 is best.",
    )
    main(["compare", str(path), "--out", str(tmp_path / "out"), "--rounds", "1"])
    out = capfd.readouterr().out.strip()
    assert out.endswith(
        "\n\nSeed 0, size tiny. The last column is the paper's, of its own data and size: compare the order of the "
        "rows, not the figures.\nThe paper's claim: 1.5 is best."
    )
    lines = out.split("\n")[:-3]
    assert lines[-6].startswith("| | accuracy | clients | MB up in a round | Fed-MoE above, of seeds | published |")
    assert [line.split(" | ")[0] for line in lines[-4:]] == ["| FedAvg", "| far", "| Fed-MoE", "| — main expert"]
    assert lines[-4].endswith("| 1.5 |")
    assert out.endswith((tmp_path / "out" / "table.md").read_text().strip())
    for name in ("curves.png", "clients.png"):
        assert (tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG"
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "<td>1.5</td>" in page and page.count("data:image/png") == 2
    assert len(read_client_table(tmp_path / "out" / "far" / "seed-0" / "_client_metrics.csv")) == 8
    with (tmp_path / "out" / "results.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    # Two uploads of 20 + 32 * 8 + 8 + 90 numbers of four bytes.
    assert all(math.isclose(float(row["megabytes_up"]), 2 * 4 * (20 + 256 + 8 + 90) / 1e6) for row in rows.values())
    assert rows["FedAvg"]["main_expert_accuracy"] == ""
    assert rows["Fed-MoE"]["top_2_accuracy"] and rows["Fed-MoE"]["clients_unseen_accuracy"]
    settings = json.loads((tmp_path / "out" / "far" / "seed-0" / "result.json").read_text())["settings"]
    assert settings["method_settings"] == {"fedprox": {"mu": 9.0}} and settings["rounds"] == 1
    assert not list((tmp_path / "out").rglob("checkpoint-*"))


def test_every_method_runs_from_equal_weights_on_equal_clients(tmp_path, monkeypatch):
    """A round in which nobody learns leaves every method's server as it was: the same for all that train one model."""
    path = written(tmp_path, methods={method: method for method in method_names()})
    draws, scores, loaded = {}, {}, []
    draw, load_data = Federation.draw, ImageExperiment.load_data

    def load_once(experiment, processor, seed):  # the clients are those of the settings, which all have in common
        loaded[:] = loaded or [load_data(experiment, processor, seed)]
        return loaded[0]

    monkeypatch.setattr(ImageExperiment, "load_data", load_once)
    for row, (run,) in runs_of(path, tmp_path / "out", rounds=1).items():
        drawn = draws.setdefault(row, [])
        monkeypatch.setattr(Federation, "draw", lambda *args, drawn=drawn: drawn.append(draw(*args)) or draw(*args))
        execute(run)
        scores[row] = json.loads((run.folder / "result.json").read_text())["metrics"]
        # What `columns` may name is what there will be.
        assert set(scores[row]) == set(KINDS[run.kind].metrics(run.method, run.parse()[0]))
    # FedJETs trains its common expert first, on the only client that is the reserved set.
    rounds = {row: drawn[-1] for row, drawn in draws.items() if row not in CENTRALISED}
    assert all(drawn == rounds["fedavg"] for drawn in rounds.values())
    # Whatever is the mean of the clients' models once is the same model.
    for row in ("fedavg_plus", "apfl", "clustered"):
        assert scores[row]["accuracy"] == scores["fedavg"]["accuracy"]
    assert scores["local"]["megabytes_up"] == 0 < scores["fedavg"]["megabytes_up"] < scores["fedem"]["megabytes_up"]


def test_finished_runs_are_read_and_stopped_ones_go_on(tmp_path, monkeypatch, caplog, warm_processes):
    path, out = written(tmp_path, seeds=[0, 1]), tmp_path / "out"
    whole = compare(path, tmp_path / "whole", num_jobs=2)
    (first, second) = runs_of(path, out)["fedavg"]
    execute(first)
    before = (first.folder / "result.json").stat().st_mtime_ns
    run_round = Federation.run_round

    def stopped(self, round_index, *args):
        if round_index == 1:
            raise KeyboardInterrupt
        return run_round(self, round_index, *args)

    monkeypatch.setattr(Federation, "run_round", stopped)
    with pytest.raises(KeyboardInterrupt):
        execute(second)
    monkeypatch.undo()
    assert (second.folder / "checkpoint-1").is_dir()

    def terminated(self, round_index, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        return run_round(self, round_index, *args)

    # As `hf-fedmoe compare` ends its processes: nobody who gave a command calls `train`.
    monkeypatch.setattr(Federation, "run_round", terminated)
    with pytest.raises(SystemExit), caplog.at_level("WARNING"):
        execute(second)
    monkeypatch.undo()
    assert "checkpoint-1 is written, the same command goes on from there" in caplog.text
    assert "resume_from_checkpoint" not in caplog.text
    assert compare(path, out) == whole
    assert (first.folder / "result.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="a finished run with another rounds: choose another `--out`"):
        compare(path, out, overrides={"rounds": 3})


def test_rows_that_are_trained_later_join_those_of_the_table(tmp_path, warm_processes):
    rows = {"constant": "majority_class", "FedAvg": "fedavg", "far": {"method": "fedprox", "mu": 9.0}}
    told = {"seeds": [0, 1], "reference": "FedAvg", "claim": "far is far."}
    path, out = written(tmp_path, methods=rows, **told), tmp_path / "out"
    compare(path, out, rows=["far"], seeds=[1], overrides={"rounds": 1})
    # Of a row that is not asked for, what is finished: one seed. And nothing of "constant", which nobody has run.
    table = compare(path, out, rows=["FedAvg"], overrides={"rounds": 1})
    lines = table.splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| FedAvg", "| far", "", "The paper's claim: far is far."]
    assert lines[0].endswith(" |  |") and lines[1].endswith("/ 1 |")
    with (out / "results.csv").open() as file:
        found = [(row["method"], row["seed"]) for row in csv.DictReader(file)]
    assert found == [("FedAvg", "0"), ("FedAvg", "1"), ("far", "1")]
    assert table + "\n" == (out / "table.md").read_text()
    # What has other settings cannot stand beside the others, and is told.
    written(tmp_path, methods=rows | {"far": {"method": "fedprox", "mu": 8.0}}, **told)
    before = (out / "far" / "seed-1" / "result.json").read_bytes()
    table = compare(path, out, rows=["constant"], overrides={"rounds": 1})
    assert [line.split(" | ")[0] for line in table.splitlines()[2:4]] == ["| constant", "| FedAvg"]
    assert table.endswith(
        "\n\nThese rows are finished with other settings and are left out:\n\n- far: another method_settings"
    )
    assert (out / "far" / "seed-1" / "result.json").read_bytes() == before
    (out / "far" / "seed-1" / "result.json").write_text("{")
    with pytest.raises(ValueError, match=r"result.json' is damaged: delete it"):
        compare(path, out, rows=["constant"], overrides={"rounds": 1})


def test_a_size_that_needs_no_data_is_named(tmp_path, monkeypatch):
    # In processes of its own: warm ones may have the variable from the shell.
    monkeypatch.delenv("HF_FEDMOE_DATA", raising=False)
    sizes = {"small": {"dataset": ["unipen"]}, "paper": {"dataset": ["nobody/femnist"]}, "tiny": {}}
    path = written(tmp_path, sizes=sizes)
    with pytest.raises(ValueError, match=r"No dataset 'unipen'.* Without data there is `--size tiny`, of what comes"):
        compare(path, tmp_path / "out")
    path = written(tmp_path, sizes={"small": sizes["small"]})
    with pytest.raises(ValueError, match=r"No dataset 'unipen'") as told:
        compare(path, tmp_path / "out")
    assert "Without data" not in str(told.value)


def test_a_run_that_fails_is_named_and_leaves_the_others_alone(tmp_path, warm_processes):
    far = {"method": "fedavg", "optim": "sgd", "learning_rate": 1e38, "max_grad_norm": 0}
    path = written(tmp_path, methods={"good": "fedavg", "far": far, "last": "majority_class"}, reference="far")
    out = tmp_path / "out"
    with pytest.raises(FailedRunsError) as failed:
        compare(path, out, overrides={"rounds": 1})
    table = (out / "table.md").read_text()
    assert table == failed.value.table + "\n"
    assert "\n| far |  |  |\n" in table and "\n| last | " in table
    assert "\n- far, seed 0: RuntimeError: No client of round 1 sent a sound model." in table
    assert "Traceback" in (out / "far" / "seed-0" / "error.txt").read_text()
    with (out / "results.csv").open() as file:
        assert [row["method"] for row in csv.DictReader(file)] == ["good", "last"]
    # What failed is tried again, with other settings too; what is finished is only read.
    before = (out / "good" / "seed-0" / "result.json").stat().st_mtime_ns
    written(tmp_path, methods={"good": "fedavg", "far": far | {"learning_rate": 0.1}, "last": "majority_class"})
    assert "failed" not in compare(path, out, overrides={"rounds": 1})
    assert (out / "good" / "seed-0" / "result.json").stat().st_mtime_ns == before
    assert not (out / "far" / "seed-0" / "error.txt").exists()


def test_what_all_runs_are_warned_of_is_told_once(tmp_path, capsys):
    """The data are the same for all methods: of ten rows on three seeds each would tell it again."""
    path = written(tmp_path, methods={"FedAvg": "fedavg", "constant": "majority_class"}, seeds=[0])
    runs = [
        run for row_runs in runs_of(path, tmp_path / "out", reserved_size=8, rounds=1).values() for run in row_runs
    ]
    try_out(runs)
    assert capsys.readouterr().out.count("Note: The reserved set of 8 rows has no example of ") == 1
    for run in runs:
        execute(run)
    assert "Note" not in capsys.readouterr().out and all(run.stored() for run in runs)


def test_results_of_two_comparisons_are_not_mixed(tmp_path):
    out = tmp_path / "out"
    (out / "fedavg" / "seed-0").mkdir(parents=True)
    ours = {"file": "digits.yaml", "kind": "images", "size": "small"}
    claim_folder(out, ours, {"rounds": 2})
    claim_folder(out, ours, {"rounds": 2})
    for theirs, settings, message in (
        ({**ours, "file": "letters.yaml"}, {"rounds": 2}, "whose file is 'digits.yaml', and this one's is 'letters"),
        ({**ours, "size": "paper"}, {"rounds": 2}, "whose size is 'small', and this one's is 'paper'"),
        (ours, {"rounds": 3}, "with another rounds: choose another `--out`"),
    ):
        with pytest.raises(ValueError, match=message):
            claim_folder(out, theirs, settings)


def test_a_damaged_result_is_named_and_other_ways_to_write_a_setting_are_the_same(tmp_path):
    (run,) = runs_of(written(tmp_path), tmp_path / "out")["fedavg"]
    assert run.stored() is None
    run.folder.mkdir(parents=True)
    as_written = run.identity | {"model_config": SETTINGS["model_config"], "eval_steps": "1e0"}
    found = {"metrics": {"accuracy": 1.0}, "curve": [], "settings": as_written}
    run.result_file.write_text(json.dumps(found))
    assert run.result().metrics == {"accuracy": 1.0}
    run.result_file.write_text(json.dumps(found)[:-9])
    with pytest.raises(ValueError, match=r"result.json' is damaged: delete it"):
        run.stored()


def test_sizes_and_settings_go_before_one_another(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"quick": SETTINGS, "large": SETTINGS | {"rounds": 50, "num_clients": 40}}))
    small_rows = {"fedavg": {"learning_rate": 0.5}}
    sizes = {"small": {"num_train_epochs": 2, "methods": small_rows}, "paper": {"recipe_preset": "large"}}
    path = written(tmp_path, recipe="recipe.yaml", sizes=sizes, settings={"clients_per_round": 3})
    (small,), (paper,), (told,) = (
        runs_of(path, tmp_path, size, **overrides)["fedavg"]
        for size, overrides in (("small", {}), ("paper", {}), ("paper", {"rounds": 7}))
    )
    args = [run.parse()[1] for run in (small, paper, told)]
    assert [(a.rounds, a.num_train_epochs, a.clients_per_round) for a in args] == [(2, 2, 3), (50, 1, 3), (7, 1, 3)]
    assert [a.save_steps for a in args] == [1, 10, 1] and small.parse()[0].num_clients == 8
    (quiet,) = runs_of(path, tmp_path, "small", eval_strategy=yaml.safe_load("no"))["fedavg"]  # False
    assert quiet.parse()[1].eval_strategy == "no"
    assert args[0].learning_rate == 0.5 != args[1].learning_rate


def test_a_start_that_has_seen_the_reserved_set_is_that_of_every_method(tmp_path):
    """Tests the start, by rounds in which clients learn nothing."""
    settings = SETTINGS | {"rounds": 1, "learning_rate": 3.0e-2, "final_expert_epochs": 0, "client_test_share": 0.0}
    settings |= {"unseen_share": 0.0, "reserved_size": 300, "max_train_examples": 600, "max_test_examples": 300}
    experiment, args = parse_settings(ImageExperiment, settings | {"start_epochs": 8}, {"output_dir": str(tmp_path)})
    _, data = experiment.load_data(processor := experiment.load_processor(), seed=0)
    trainers = [make_trainer(method, experiment, args, data, processor) for method in ("fedavg", "local", "fedmoe")]
    starts = [as_expert(trainers[0].model), trainers[1].model, trainers[2].model.experts[-1]]
    for model in starts[1:]:
        assert_equal_states(state(model), state(starts[0]))
    assert trainers[0].evaluate(data.test)["eval_accuracy"] > 0.4
    experiment.start_epochs = 0
    cold = make_trainer("fedavg", experiment, args, data, processor)
    assert cold.evaluate(data.test)["eval_accuracy"] < 0.3


def test_defences_are_settings_of_rows(tmp_path):
    rows = {
        "median": {"method": "fedavg", "robust_fusion": "median", "max_update_norm_ratio": 2.0},
        "floor": {"method": "fedmoe", "reserved_floor": 0.5, "max_expert_share": 0.6, "expected_attackers": 0.1},
    }
    (median,), (floor,) = runs_of(written(tmp_path, methods=rows), tmp_path / "out").values()
    of_median, of_floor = median.parse()[1], floor.parse()[1]
    assert (of_median.robust_fusion, of_median.max_update_norm_ratio) == ("median", 2.0)
    assert (of_floor.reserved_floor, of_floor.max_expert_share, of_floor.expected_attackers) == (0.5, 0.6, 0.1)
