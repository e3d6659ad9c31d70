"""Settings of YAML and of a command line as their data classes want them."""

import numpy as np
import pytest
from transformers import SchedulerType

from hf_fedmoe.experiments import ImageExperiment, TextExperiment, parse_settings, read_words
from hf_fedmoe.experiments.methods import make_strategy, own_settings
from hf_fedmoe.experiments.settings import settings_of, typed, typed_settings
from hf_fedmoe.training import FedMoETrainingArguments


KNOWN = settings_of(ImageExperiment, FedMoETrainingArguments)
LEAST = {"dataset": ["digits"], "model": ["small_cnn"], "use_cpu": True}


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("learning_rate", "1e-1", 0.1),
        ("learning_rate", 1, 1.0),
        ("learning_rate", np.float32(0.5), 0.5),
        ("rounds", "1e3", 1000),
        ("rounds", 7.0, 7),
        ("rounds", np.int64(7), 7),
        ("client_ranks", ["8", 4], [8, 4]),
        ("client_ranks", 8, [8]),
        ("dataset", "digits", ["digits"]),
        ("bf16", "no", False),
        ("bf16", "on", True),
        ("bf16", 1, True),
        ("model_config", {"channels": [4, 8]}, '{"channels": [4, 8]}'),
        ("label_column", 5, "5"),
        ("label_column", None, None),
        ("max_train_examples", "none", None),
        ("eval_strategy", False, "no"),
        ("lr_scheduler_type", SchedulerType.CONSTANT, "constant"),
        ("report_to", ["tensorboard"], ["tensorboard"]),
    ],
)
def test_values_become_what_they_mean(name, value, wanted):
    found = typed(name, value, KNOWN[name])
    assert found == wanted and type(found) is type(wanted)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rounds", "five", "`rounds` is 'five': give a whole number."),
        ("rounds", 2.5, "`rounds` is 2.5: give a whole number."),
        ("rounds", float("inf"), "`rounds` is inf: give a whole number."),
        ("rounds", True, "`rounds` is True: give a whole number."),
        ("rounds", [3], r"`rounds` is \[3\]: give a whole number."),
        ("rounds", None, "`rounds` is empty: give a whole number, or leave it out."),
        ("learning_rate", "nan", "`learning_rate` is nan: give a finite number."),
        ("learning_rate", float("-inf"), "`learning_rate` is -inf: give a finite number."),
        ("client_ranks", [8, "x"], "`client_ranks` is 'x': give a whole number."),
        ("bf16", "maybe", "`bf16` is 'maybe': give true or false."),
        ("label_column", True, "`label_column` is True: give a text."),
        ("dataset", {"a": 1}, "`dataset` is {'a': 1}: give a list"),
        ("lr_scheduler_type", "konstant", "`lr_scheduler_type` is 'konstant': is it constant"),
        ("eval_strategy", "sometimes", "`eval_strategy` is 'sometimes': choose from no, steps, epoch."),
        ("log_level", "loud", "`log_level` is 'loud': choose from detail, debug"),
    ],
)
def test_values_of_another_type_are_refused(name, value, message):
    with pytest.raises(ValueError, match=message):
        typed(name, value, KNOWN[name])


def test_unknown_settings_get_the_nearest_name():
    with pytest.raises(ValueError, match="There is no setting 'num_client': is it num_clients"):
        typed_settings({"num_client": 3}, KNOWN)


def test_words_of_a_command_line():
    words = ["--rounds", "5", "--learning-rate=1e-3", "--compare", "fedavg", "fedmoe", "--bf16", "--no_use_cpu"]
    words += ["--reserved_size", "-1", "--rounds=6"]
    assert read_words(words) == {
        "rounds": "6",
        "learning_rate": "1e-3",
        "compare": ["fedavg", "fedmoe"],
        "bf16": True,
        "use_cpu": False,
        "reserved_size": "-1",
    }
    with pytest.raises(ValueError, match="'rounds' follows no setting: write --name value"):
        read_words(["rounds", "5"])


def test_own_settings_of_a_method_are_typed_too():
    given = {"method_settings": {"fedprox": {"mu": "1e-1"}, "fedrolex": {"capacities": ["1", 0.5]}}}
    experiment, args = parse_settings(ImageExperiment, LEAST | given)
    assert make_strategy("fedprox", experiment, args).mu == 0.1
    assert make_strategy("fedrolex", experiment, args).capacities == (1.0, 0.5)
    with pytest.raises(ValueError, match="`adapt` is 'perhaps': give true or false"):
        typed_settings({"adapt": "perhaps"}, own_settings("apfl"))


def test_adapters_learn_at_their_own_rates_unless_told():
    given = {"dataset": "reviews", "model": "gpt2-reviews", "use_cpu": True, "learning_rate": 1e-4}
    given |= {"with_lora": {"learning_rate": "3e-3"}}
    rates = [
        parse_settings(TextExperiment, given, told)[1].learning_rate
        for told in ({}, {"peft": "lora"}, {"peft": "lora", "learning_rate": "1e-2"})
    ]
    assert rates == [1e-4, 3e-3, 1e-2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "`seed` is -1: give a whole number from 0 to 4294967295"),
        ({"client_draw_seed": 2**32}, "`client_draw_seed` is 4294967296: give a whole number from 0"),
        ({"dataset": []}, r"`dataset` is \[\]: give at least one name"),
        ({"compare": ["fedavg", "fedavg"]}, "`compare` is .*: give every method once"),
        ({"num_clients": 0}, "`num_clients` is 0: give at least 1"),
        ({"reserved_size": -1}, "`reserved_size` is -1: give at least 0"),
        ({"client_test_share": 1}, r"`client_test_share` is 1.0: give a share in \[0, 1\)"),
        ({"partition": "sorted"}, "`partition` is 'sorted': choose one of predominant.*pachinko"),
        ({"partition": "dirichlet", "dirichlet_alpha": 0}, "`dirichlet_alpha` is 0.0: give more than 0"),
        ({"share_low": 0.9, "share_high": 0.1}, "`share_low` is 0.9 and `share_high` 0.1"),
        ({"reserved_share": 2}, "`reserved_share` is 2.0"),
        ({"model_config": "{channels"}, "`model_config` is '{channels', which is no JSON"),
        ({"model_config": "[1]"}, r"`model_config` is \[1\]: give names and values"),
        ({"image_size": 0}, "`image_size` is 0: give at least 1"),
        ({"num_channels": 2}, "`num_channels` is 2: give 1 for grey images or 3"),
        ({"augmentation": "mirrors"}, "`augmentation` is 'mirrors': choose one of photographs"),
        ({"validation_size": 0, "eval_strategy": "steps"}, "`validation_size` is 0, but `eval_strategy` is 'steps'"),
        ({"model": None}, "`model` is empty"),
        ({"per_device_train_batch_size": 0}, "`per_device_train_batch_size` is 0: give at least 1"),
        ({"gradient_accumulation_steps": 0}, "`gradient_accumulation_steps` is 0: give at least 1"),
        ({"weight_decay": -1}, "`weight_decay` is -1.0: give 0 or more"),
        ({"max_grad_norm": -1}, "`max_grad_norm` is -1.0: give 0 or more"),
        ({"eval_steps": -1}, "`eval_steps` is -1.0: give 0 or more"),
        ({"dataloader_num_workers": -1}, "`dataloader_num_workers` is -1: give 0 or more"),
        ({"adam_beta2": 1}, r"`adam_beta2` is 1.0: give a number in \[0, 1\)"),
        ({"optim_args": "momentum"}, "`optim_args` is 'momentum': write name=value"),
    ],
)
def test_settings_out_of_their_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        parse_settings(ImageExperiment, LEAST | changes)


def test_a_data_set_or_a_model_must_be_named():
    with pytest.raises(ValueError, match="There is no 'dataset' among the settings"):
        parse_settings(ImageExperiment, {"model": "small_cnn"})
