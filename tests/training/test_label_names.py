"""Names of classes: the model's against the data's, and the data's in whatever is saved."""

import json

import datasets
import numpy as np
import pytest
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, PreTrainedConfig

from hf_fedmoe.data import FederatedDataset
from hf_fedmoe.strategies import FedMoE
from hf_fedmoe.training import FederatedTrainer
from hf_fedmoe.training.label_names import settle_label_names, write_label_names
from tests.every_method import trained
from tests.tiny_federation import (
    assert_equal_states,
    state,
    tiny_args,
    tiny_ensemble,
    tiny_expert,
    tiny_gated_experts,
    tiny_mixture,
    tiny_multi_head,
    tiny_rows,
)


NAMES = ["bad", "fair", "good"]
DEFAULT = ["LABEL_0", "LABEL_1", "LABEL_2"]


def named_rows(names=NAMES, count=70):
    return tiny_rows(count).cast_column("label", datasets.ClassLabel(names=list(names)))


def federation(names=NAMES):
    rows = named_rows(names) if names else tiny_rows(70).cast_column("label", datasets.Value("int64"))
    return FederatedDataset(rows, np.split(np.arange(40), 4), reserved=np.arange(40, 60), validation=np.arange(60, 70))


def expert(names=DEFAULT):
    model = tiny_expert()
    write_label_names(model, names)
    return model


def names_of(config):
    assert config.label2id == {name: label for label, name in config.id2label.items()}
    return [config.id2label[label] for label in range(config.num_labels)]


def sub_configs(config):
    return [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]


@pytest.mark.parametrize(
    ("own", "names", "after"),
    [
        (DEFAULT, NAMES, NAMES),
        (NAMES, NAMES, NAMES),
        (NAMES, None, NAMES),
        (NAMES, ["0", "1", "2"], NAMES),
        (DEFAULT, None, DEFAULT),
        (DEFAULT, ["0", "1", "2"], ["0", "1", "2"]),
        (["BAD", "Fair ", "good"], NAMES, ["BAD", "Fair ", "good"]),
        (["LABEL_0", "fair", "LABEL_2"], NAMES, NAMES),
        (["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"], NAMES, [*NAMES, "LABEL_3"]),
        ([*NAMES, "great"], NAMES, [*NAMES, "great"]),
        (["1", "2", "0"], None, ["1", "2", "0"]),
        (["0", "1", "2"], NAMES, NAMES),
        (["0", "1", "2"], ["1", "2", "3"], ["1", "2", "3"]),
    ],
)
def test_the_names_that_a_model_ends_with(own, names, after):
    model = tiny_expert()
    model.config.id2label, model.config.label2id = dict(enumerate(own)), {}
    settle_label_names(model, federation(names))
    assert names_of(model.config) == after


@pytest.mark.parametrize(
    ("own", "names", "message"),
    [
        (["good", "fair", "bad"], NAMES, "classes are good, fair, bad, the data's bad, fair, good: in another order"),
        (["GOOD", "fair", "bad"], NAMES, "in another order"),
        (["great", "bad", "fair", "good"], NAMES, "great, bad, fair, good, the data's bad, fair, good: in another or"),
        (["LABEL_0", "bad", "LABEL_2"], NAMES, "class 1 is 'bad' in the model"),
        (["bad", "fair", "great"], NAMES, "class 2 is 'great' in the model.*id2label=dict.enumerate.data.label_names"),
        (["spam", "ham", "eggs"], NAMES, r"class 0 is 'spam'.*ClassLabel\(names=\['spam', 'ham', 'eggs'\]\)"),
        (["1", "2", "3"], ["0", "1", "2"], None),
        (["a", "A", "b"], ["A", "a", "b"], "in another order"),
        ([*DEFAULT, "bad"], NAMES, "class 3 is 'bad' in the model"),
    ],
)
def test_names_that_contradict_each_other_are_refused(tmp_path, own, names, message):
    model = tiny_expert()
    write_label_names(model, own)
    data = federation(names)
    if message is None:
        settle_label_names(model, data)
        assert names_of(model.config) == own
        return
    with pytest.raises(ValueError, match=message):
        FederatedTrainer(model, tiny_args(tmp_path), data)


@pytest.mark.parametrize("start", [tiny_expert, tiny_mixture, tiny_ensemble, tiny_multi_head])
def test_the_remedies_work(tmp_path, start):
    model, rows = start(), named_rows()
    write_label_names(model, ["good", "fair", "bad"])
    model.save_pretrained(tmp_path / "start")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "start")
    clients = np.split(np.arange(40), 4)
    data = FederatedDataset(rows, clients, reserved=np.arange(40, 70))
    strategy = FedMoE() if start is tiny_mixture else None
    with pytest.raises(ValueError, match="another order") as refused:
        FederatedTrainer(model, tiny_args(tmp_path, rounds=1), data, strategy=strategy)
    # One line, as it is said.
    line = next(part for part in str(refused.value).split("`") if part.startswith("dataset.align"))
    aligned = eval(line, {"dataset": rows, "model": model})
    turned = FederatedDataset(aligned, clients, reserved=np.arange(40, 70))
    assert turned.label_names == ["good", "fair", "bad"] and turned.pool["label"][:] == [2 - i for i in rows["label"]]
    run = FederatedTrainer(model, tiny_args(tmp_path, rounds=1), turned, strategy=strategy)
    assert names_of(run.model.config) == ["good", "fair", "bad"]
    # Or the model learns them anew.
    argument = next(part for part in str(refused.value).split("`") if part.startswith("id2label="))
    names = eval(argument.removeprefix("id2label="), {"data": data})
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "start", id2label=names)
    run = FederatedTrainer(model, tiny_args(tmp_path, rounds=1), data, strategy=strategy)
    run.save_model(tmp_path / "saved")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert names_of(loaded.config) == NAMES and all(names_of(config) == NAMES for config in sub_configs(loaded.config))


@pytest.mark.parametrize("start", [tiny_mixture, tiny_ensemble, tiny_multi_head])
def test_names_reach_every_classifier_and_what_is_saved(tmp_path, start):
    model = start()
    settle_label_names(model, federation())
    assert names_of(model.config) == names_of(model.config.expert_config) == NAMES
    parts = [module for module in model.modules() if type(module).__name__.endswith("Classification")]
    assert len(parts) >= 2 and all(names_of(part.config) == NAMES for part in parts)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert list(stored["id2label"].values()) == list(stored["expert_config"]["id2label"].values()) == NAMES
    loaded = type(model).from_pretrained(tmp_path)
    assert names_of(loaded.config) == names_of(loaded.config.expert_config) == NAMES
    assert_equal_states(state(loaded), state(model))


def test_a_gate_has_no_classes():
    model = tiny_gated_experts(3)  # as many experts as classes
    settle_label_names(model, federation())
    assert names_of(model.routed_experts[2].config) == NAMES
    assert names_of(model.gate.config) == names_of(model.config.gate_config) == DEFAULT


@pytest.mark.parametrize("mixture", [False, True])
def test_adapters(tmp_path, mixture):
    lora = LoraConfig(r=2)
    model = tiny_mixture(peft_config=lora) if mixture else tiny_expert()
    args, strategy = tiny_args(tmp_path, rounds=1), FedMoE() if mixture else None
    run = FederatedTrainer(model, args, federation(), strategy=strategy, peft_config=None if mixture else lora)
    assert names_of(run.model.config) == NAMES
    base = run.model.base.get_base_model() if mixture else run.model.get_base_model()
    assert names_of(base.config) == NAMES


@pytest.mark.parametrize("method", ["fedem", "pfedmoe"])
def test_personal_models_have_the_names(tmp_path, method):
    run = trained(tmp_path, method, federation(), rounds=1)
    own = run.personalize(1)
    own.save_pretrained(tmp_path / "own")
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "own").config
    assert names_of(config) == NAMES and all(names_of(part) == NAMES for part in sub_configs(config))


def test_an_ensemble_keeps_names_that_were_given_to_it(tmp_path):
    for model in (tiny_ensemble(), tiny_multi_head()):
        model.config.id2label = dict(enumerate(NAMES))
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        assert names_of(loaded.config) == names_of(loaded.config.expert_config) == NAMES


def test_more_classes_than_the_model_has(tmp_path):
    with pytest.raises(ValueError, match="The data has 3 labels, the model 2"):
        FederatedTrainer(
            AutoModelForSequenceClassification.from_config(tiny_expert().config.__class__(num_labels=2)),
            tiny_args(tmp_path),
            federation(),
        )
