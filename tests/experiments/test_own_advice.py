import pytest

from hf_fedmoe.experiments.own_advice import RunBeside, advise, margin
from hf_fedmoe.training import FedMoETrainingArguments


@pytest.fixture
def args(tmp_path):
    return FedMoETrainingArguments(str(tmp_path), rounds=6, learning_rate=1e-3, use_cpu=True)


def advice(args, accuracy, others, losses, model="small_cnn"):
    return list(advise(RunBeside("fedmoe", accuracy, others, 400, losses, 3), args, model))


def test_margin_is_two_standard_errors():
    assert margin(0.5, 400) == pytest.approx(0.05)
    assert margin(1.0, 100) == pytest.approx(0.02)


def test_a_run_above_the_others_needs_none(args):
    assert advice(args, 0.8, {"majority_class": 0.4, "fedavg": 0.7}, [1.0, 0.5]) == []


@pytest.mark.parametrize(
    ("losses", "first"),
    [
        ([1.0, 1.3], "  --learning_rate 0.0003: the loss rose from 1.000 to 1.300;"),
        ([1.0, float("nan")], "  --learning_rate 0.0003: the loss rose from 1.000 to nan;"),
        ([1.0, 0.99], "  --learning_rate 0.003: the loss hardly moved, 1.000 to 0.990;"),
        ([1.0, 0.5], "  --rounds 12: the loss was still falling;"),
        ([1.0], "  --rounds 12 or --num_train_epochs 2;"),
        ([1.0, 0.7, 0.6, 0.5, 0.5, 0.5, 0.5, 0.5], "  --rounds 12 or --num_train_epochs 2;"),
    ],
)
def test_a_run_level_with_the_majority_class_is_told_what_its_loss_says(args, losses, first):
    said = advice(args, 0.42, {"majority_class": 0.4}, losses)
    assert said[0] == "fedmoe is not clearly above always naming the most frequent class. Try"
    assert said[1] == first and "a pretrained start in the place of small_cnn" in said[-2]


def test_a_control_is_better_only_beyond_what_the_test_can_tell(args):
    (level,) = advice(args, 0.70, {"majority_class": 0.4, "fedavg": 0.72}, [1.0, 0.5])
    assert level == "fedavg is 2.0 points above fedmoe, less than the test can tell apart: more test rows would."
    above = advice(args, 0.70, {"majority_class": 0.4, "fedavg": 0.80}, [1.0, 0.5], "user/model")
    assert above[0] == "fedavg is 10.0 points above fedmoe: on these data it is the better choice, --method fedavg."
    assert "  a larger start than model, pretrained on the language of your data, --model;" in above
