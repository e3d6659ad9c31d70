"""Metrics of `evaluate`: of a folder, and scikit-learn's in the place of those that cannot be reached."""

import os

import evaluate
import numpy as np
import pytest
import sklearn.metrics
from transformers import EvalPrediction

from hf_fedmoe import FederatedTrainer, evaluate_metrics
from tests.test_docs import blocks, newcomer, run  # noqa: F401
from tests.tiny_federation import tiny_args, tiny_expert, tiny_federation


LABELS_B = np.array([0, 1, 2, 2, 1, 0, 2])
ANSWERS_B = np.array([0, 2, 2, 2, 1, 1, 2])
PREDICTION = EvalPrediction(predictions=np.eye(4, dtype=np.float32)[ANSWERS_B], label_ids=LABELS_B)

SCRIPT = """
import datasets
import evaluate


class Misses(evaluate.Metric):
    def _info(self):
        row = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description="Counts what is wrong.", citation="", inputs_description="", features=datasets.Features(row)
        )

    def _compute(self, predictions, references, weight=1.0):
        wrong = sum(one != other for one, other in zip(predictions, references))
        return {"misses": weight * wrong}
"""


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Nobody is asked."""
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)


@pytest.fixture
def misses(tmp_path):
    """A folder with the script of a metric."""
    folder = tmp_path / "misses"
    folder.mkdir()
    (folder / "misses.py").write_text(SCRIPT)
    return os.fspath(folder)


def test_without_a_network_figures_are_those_of_scikit_learn(recwarn, capfd):
    found = evaluate_metrics("accuracy", "f1", "precision", "recall", "matthews_correlation")(PREDICTION)
    average = {"average": "macro", "zero_division": 0}
    assert found == {
        "accuracy": 5 / 7,
        "f1": pytest.approx(sklearn.metrics.f1_score(LABELS_B, ANSWERS_B, average="macro")),
        "precision": pytest.approx(sklearn.metrics.precision_score(LABELS_B, ANSWERS_B, **average)),
        "recall": pytest.approx(sklearn.metrics.recall_score(LABELS_B, ANSWERS_B, **average)),
        "matthews_correlation": pytest.approx(sklearn.metrics.matthews_corrcoef(LABELS_B, ANSWERS_B)),
    }
    assert not recwarn.list and capfd.readouterr().err == ""


def test_settings_go_to_their_metric_only():
    found = evaluate_metrics("accuracy", "f1", f1={"average": "micro"})(PREDICTION)
    assert found == {"accuracy": pytest.approx(5 / 7), "f1": pytest.approx(5 / 7)}


def test_a_folder_is_loaded_and_combined(misses):
    found = evaluate_metrics(misses, "accuracy")(PREDICTION)
    assert found == {"misses": 2.0, "accuracy": pytest.approx(5 / 7)}
    assert evaluate_metrics(evaluate.load(misses), misses={"weight": 0.5})(PREDICTION) == {"misses": 1.0}


def test_a_trainer_reports_them(misses, tmp_path):
    data = tiny_federation()
    metrics = evaluate_metrics("accuracy", misses)
    trainer = FederatedTrainer(tiny_expert(), tiny_args(tmp_path / "run"), data, compute_metrics=metrics)
    rows = data.client(0)
    found = trainer.evaluate(rows)
    assert found["eval_misses"] == round((1 - found["eval_accuracy"]) * len(rows))


def test_the_environment_keeps_the_hub_from_being_asked(monkeypatch):
    def ask(*args, **kwargs):
        raise AssertionError("the Hub is asked")

    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", False)
    monkeypatch.setattr("hf_fedmoe.training.hub_metrics.is_offline_mode", lambda: True)
    monkeypatch.setattr("requests.sessions.Session.send", ask)
    assert evaluate_metrics("accuracy")(PREDICTION) == {"accuracy": 5 / 7}


@pytest.mark.parametrize(
    ("metrics", "settings", "message"),
    [
        (("rouge",), {}, "The metric 'rouge' is no folder .* Without a network there are accuracy, f1"),
        (("accuracy",), {"f1": {}}, "There are settings for 'f1', and the metrics are accuracy."),
        (("f1",), {"f1": {"averge": "macro"}}, "The metric 'f1' cannot be computed .* 'averge'"),
        ((), {}, "There is no metric: name one"),
        ((3,), {}, r"`metrics` has 3, a int: give names one by one, `evaluate_metrics\(\"accuracy\", \"f1\"\)`"),
        ((["accuracy"],), {}, r"`metrics` has \['accuracy'\], a list: give names one by one"),
        (("f1",), {"f1": "micro"}, "`f1` is 'micro': give the settings of that metric by name"),
        (("f1",), {"f1": {"average": None}}, "The metric 'f1' cannot be computed .*'average': None"),
        (("accuracy", "accuracy"), {}, "The metric 'accuracy' is there 2 times: name each once"),
    ],
)
def test_wrong_metrics_are_refused_before_training(metrics, settings, message):
    with pytest.raises(ValueError, match=message):
        evaluate_metrics(*metrics, **settings)


def test_metrics_of_fewer_classes_are_refused_before_training(tmp_path):
    data = tiny_federation()

    def train(compute_metrics, **changes):
        run = FederatedTrainer(
            tiny_expert(), tiny_args(tmp_path, **{"rounds": 1, **changes}), data, compute_metrics=compute_metrics
        )
        try:
            run.train()
        finally:
            assert run.rounds == [] or compute_metrics is fits
        return run

    with pytest.raises(ValueError, match=r"`compute_metrics` fails on .* 3 classes, .*average='binary'.* Mend it"):
        train(evaluate_metrics("f1", f1={"average": "binary"}))
    with pytest.raises(ValueError, match=r"`compute_metrics` returns 0.5 of .*: return a `dict`"):
        train(lambda prediction: 0.5)
    seen = []

    def fits(prediction):
        assert len(prediction.label_ids) == len(data.validation)  # one that knows its rows
        seen.append(set(prediction.label_ids.tolist()))
        return {"mine": 1.0}

    assert train(fits, eval_strategy="steps").state.log_history[-1]["train_loss"] > 0
    assert len(seen) == 2 and seen[0] == {0, 1, 2}


def test_metrics_of_lists_of_batches_are_not_tried(tmp_path):
    """They take another form of predictions than made-up scores have."""
    sizes = []

    def of_batches(prediction):
        sizes.append([len(labels) for labels in prediction.label_ids])
        return {"mine": 1.0}

    run = FederatedTrainer(
        tiny_expert(),
        tiny_args(tmp_path, rounds=1, eval_strategy="steps", eval_do_concat_batches=False),
        tiny_federation(),
        compute_metrics=of_batches,
    )
    run.train()
    assert sizes == [[8, 8, 4]]


def test_metrics_of_the_docs(newcomer):  # noqa: F811
    (example,) = blocks("docs/metrics.md")
    trainer = run(example.replace("rounds=2", "rounds=1"))["trainer"]
    assert {"eval_accuracy", "eval_f1", "eval_matthews_correlation"} <= trainer.state.log_history[-1].keys()
