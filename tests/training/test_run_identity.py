"""Two runs must have everything but a short list in common for one to resume the other."""

import dataclasses
import enum
import functools
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import DataCollatorWithPadding

from hf_fedmoe.data import ImageCollator, random_crop, random_flip
from hf_fedmoe.strategies import FedAvg, FedMoE, FedMoESettings, FedProx
from hf_fedmoe.training import FederatedTrainer, FederatedTrainingArguments
from hf_fedmoe.training.plain_values import plain
from hf_fedmoe.training.run_identity import HARMLESS, check_identity, first_difference
from tests.tiny_federation import tiny_args, tiny_decoder, tiny_expert, tiny_federation, tiny_mixture
from tests.tiny_images import tiny_image_federation, tiny_processor, tiny_resnet


# Nothing is written there.
FOLDER = tempfile.mkdtemp()
DATA = tiny_federation()


def identity(model=None, strategy=None, data=DATA, collator=None, **changes):
    args = tiny_args(FOLDER, **{"save_strategy": "steps"} | changes)
    trainer = FederatedTrainer(
        model or tiny_expert(), args, data, strategy, data_collator=collator or DataCollatorWithPadding(None)
    )
    return json.loads(json.dumps(trainer._identity()))


@pytest.fixture(scope="module")
def own():
    return identity()


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 1e-3},
        {"max_grad_norm": 0.01},
        {"warmup_steps": 3},
        {"adam_beta1": 0.5},
        {"adam_epsilon": 1e-6},
        {"optim": "sgd"},
        {"optim_args": "momentum=0.9"},
        {"lr_scheduler_type": "constant"},
        {"lr_scheduler_kwargs": {"num_cycles": 2}},
        {"bf16": True},
        {"per_device_train_batch_size": 2},
        {"per_device_eval_batch_size": 2},  # that of the server's passes over the reserved set
        {"num_train_epochs": 0.5},
        {"activation_checkpointing": True},
        {"dataloader_drop_last": True},
        {"client_draw_seed": 7},
        {"client_choice": "stratified"},
        {"clients_at_once": 2},
        {"client_parallelism": "sums"},
        {"upload_compression": "bf16"},
        {"robust_fusion": "median"},
        {"expected_attackers": 0.1},
        {"max_update_norm_ratio": 2.0},
    ],
    ids=lambda change: list(change)[-1],
)
def test_another_argument_is_refused_by_its_name(change, own):
    name, value = list(change.items())[-1]
    with pytest.raises(ValueError, match=rf"checkpoint-3 was written with {name} = .*, this run has .*: resume with"):
        check_identity(own, identity(**change), "checkpoint-3")
    assert first_difference(own, identity(**change))[2] == plain(value)


@pytest.mark.parametrize(
    "change",
    [
        {"output_dir": f"{FOLDER}/elsewhere", "run_name": "again", "report_to": "tensorboard"},
        {"logging_steps": 5, "disable_tqdm": False, "log_level": "info"},
        {"save_steps": 7, "save_total_limit": 1, "save_only_model": True, "save_strategy": "no"},
        {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "loss"},
        {"push_to_hub": False, "hub_model_id": "user/model", "hub_token": "hf_x"},
        {"rounds": 30},
        {"ddp_timeout": 5, "dataloader_pin_memory": True},
        {"gate_epochs": 3},  # FedAvg has no gate
        {"do_eval": True, "resume_from_checkpoint": "x"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_is_harmless_may_be_another(change, own):
    if "output_dir" in change:
        args = tiny_args(change["output_dir"], **{n: v for n, v in change.items() if n != "output_dir"})
        trainer = FederatedTrainer(tiny_expert(), args, DATA, data_collator=DataCollatorWithPadding(None))
        other = trainer._identity()
    else:
        other = identity(**change)
    assert first_difference(own, other) is None


def test_every_argument_counts_or_is_in_the_list_with_a_reason(own):
    harmless = [name for names in HARMLESS.values() for name in names]
    fields = {field.name for field in dataclasses.fields(FederatedTrainingArguments)}
    of_fedmoe = {field.name for field in dataclasses.fields(FedMoESettings)}
    assert len(harmless) == len(set(harmless)) and set(harmless) <= fields - of_fedmoe
    assert fields - of_fedmoe - set(harmless) <= own.keys()
    assert not own.keys() & (set(harmless) | of_fedmoe)


def test_a_longer_run_is_another_one_where_a_schedule_spans_it():
    scope = {"lr_scheduler_scope": "run"}
    assert first_difference(identity(**scope), identity(**scope, rounds=9)) == ("rounds", 3, 9)
    scope["lr_scheduler_type"] = "constant"
    assert first_difference(identity(**scope), identity(**scope, rounds=9)) is None


def test_batches_may_be_read_by_more_workers_but_none_and_some_are_two_runs(own):
    one, two = (identity(dataloader_num_workers=count) for count in (1, 2))
    assert first_difference(one, two) is None
    assert first_difference(own, one) == ("dataloader_workers", "none", "some")


def test_the_models_configuration_counts_but_not_its_names(own):
    for change, found in (
        ({"hidden_dropout_prob": 0.1}, ("model_config.hidden_dropout_prob", 0.0, 0.1)),
        ({"hidden_act": "relu"}, ("model_config.hidden_act", "gelu", "relu")),
        ({"layer_norm_eps": 1e-6}, ("model_config.layer_norm_eps", 1e-12, 1e-6)),
    ):
        torch.manual_seed(7)
        model = type(tiny_expert())(type(tiny_expert().config)(**tiny_expert().config.to_dict() | change))
        assert first_difference(own, identity(model)) == found
    model = tiny_expert()
    model.config.id2label = {0: "bad", 1: "fair", 2: "good"}
    model.config.problem_type = "single_label_classification"
    model.config._name_or_path = "somewhere"
    assert first_difference(own, identity(model)) is None


def test_dropout_that_a_script_sets_in_the_model_counts(own):
    model = tiny_expert()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    assert first_difference(own, identity(model))[0] in ("dropout.0.0", "dropout.0.3")


def test_what_is_trained_counts_by_name():
    first, second = tiny_expert(), tiny_expert()
    first.bert.encoder.layer[0].output.dense.weight.requires_grad_(False)
    second.bert.encoder.layer[1].output.dense.weight.requires_grad_(False)
    assert first_difference(identity(first), identity(second))[0] == "trained_tensors"


def test_settings_of_a_mixture_and_of_adapters_count():
    def adapters(**changes):
        return tiny_mixture(peft_config=LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], **changes))

    plain_one = identity(adapters(), FedMoE())
    assert first_difference(plain_one, identity(adapters(), FedMoE())) is None
    found = first_difference(plain_one, identity(adapters(lora_alpha=3), FedMoE()))
    assert found == ("model_config.peft_config.lora_alpha", 8, 3)
    found = first_difference(plain_one, identity(adapters(), FedMoE(FedMoESettings(fusion_rate=0.5))))
    assert found == ("strategy_settings.fusion_rate", 0.3, 0.5)
    args = tiny_args(FOLDER)
    made = [
        FederatedTrainer(tiny_expert(), args, DATA, peft_config=LoraConfig(target_modules=["query"], lora_alpha=alpha))
        for alpha in (8, 16)
    ]
    first, second = (trainer._identity() for trainer in made)
    assert first_difference(first, second) == ("peft_config.lora_alpha", 8, 16)


def test_a_strategy_counts_by_its_class_and_all_its_attributes(own):
    class Momentum(FedAvg):
        def __init__(self, momentum, _rates=(1, 2)):
            self.momentum, self._rates, self.weights = momentum, _rates, torch.ones(3)

    mine = identity(strategy=Momentum(0.5))
    assert first_difference(own, mine) == ("strategy_class", "FedAvg", Momentum.__qualname__)
    assert first_difference(mine, identity(strategy=Momentum(0.5))) is None
    assert first_difference(mine, identity(strategy=Momentum(0.9))) == ("strategy_settings.momentum", 0.5, 0.9)
    found = first_difference(mine, identity(strategy=Momentum(0.5, (1, 3))))
    assert found == ("strategy_settings._rates", [1, 2], [1, 3])
    heavy = Momentum(0.5)
    heavy.weights[1] = 2
    assert first_difference(mine, identity(strategy=heavy))[0] == "strategy_settings.weights"
    heavy = Momentum(0.5)
    heavy.extra = 1
    assert first_difference(mine, identity(strategy=heavy)) == ("strategy_settings.extra", "nothing", 1)
    replaced = Momentum(0.5)
    replaced.finish = lambda *_: None  # a method in the instance is no setting
    assert first_difference(mine, identity(strategy=replaced)) is None
    assert first_difference(own, identity(strategy=FedProx(0.1)))[0] == "strategy"


def test_the_contents_of_the_rows_count_and_what_no_model_reads_does_not(own):
    other = tiny_federation()
    other.pool = other.pool.map(lambda row: {"input_ids": [5] * 8})
    assert first_difference(own, identity(data=other))[0] == "rows"
    other = tiny_federation()
    other.pool = other.pool.add_column("text", ["unread"] * len(other.pool))
    assert first_difference(own, identity(data=other)) is None
    other.pool = other.pool.flatten_indices()
    assert first_difference(own, identity(data=other)) is None
    assert first_difference(own, identity(data=tiny_federation(seed=1)))[0] == "data"


def test_what_augments_counts():
    data = tiny_image_federation()

    def images(*augmentations, mean=0.5):
        processor = tiny_processor()
        processor.image_mean = [mean] * len(processor.image_mean)
        collator = ImageCollator(processor, augmentations)
        args = tiny_args(FOLDER)
        made = FederatedTrainer(tiny_resnet(), args, data, processing_class=processor, train_data_collator=collator)
        return json.loads(json.dumps(made._identity()))

    flips = images(random_flip)
    assert first_difference(flips, images(random_flip)) is None
    found = first_difference(flips, images(random_flip, random_crop))
    assert found == ("train_data_collator.augmentations", ["random_flip"], ["random_flip", "random_crop"])
    padded = images(functools.partial(random_crop, padding=2))
    assert first_difference(padded, images(functools.partial(random_crop, padding=3)))[0].startswith("train_data_coll")
    assert first_difference(flips, images(random_flip, mean=0.4))[0] == "train_data_collator._shift_N11"


def test_a_model_loaded_from_a_checkpoint_is_the_same_run(tmp_path):
    for made, model in (("expert", tiny_expert), ("decoder", tiny_decoder)):
        args = tiny_args(tmp_path / made, rounds=1, save_strategy="steps")
        FederatedTrainer(model(), args, DATA).train()
        loaded = type(model()).from_pretrained(tmp_path / made / "checkpoint-1")
        args = tiny_args(tmp_path / made, rounds=2)
        resumed = FederatedTrainer(loaded, args, DATA)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 2 and len(resumed.rounds) == 1


def test_an_argument_that_a_checkpoint_does_not_know_had_its_default(own):
    older = {name: value for name, value in own.items() if name != "clients_at_once"}
    assert first_difference(older, own) is None
    assert first_difference(older, own | {"clients_at_once": 4}) == ("clients_at_once", 1, 4)
    older["model_config"] = {n: v for n, v in own["model_config"].items() if n != "hidden_act"}
    assert first_difference(older, own) is None


class Colour(enum.Enum):
    RED = "red"


class Thing:
    def __init__(self, inner=None):
        self.inner, self.rng = inner, np.random.default_rng(0)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Colour.RED, "red"),
        ((1, 2.5, None, True), [1, 2.5, None, True]),
        ({3: (4,)}, {"3": [4]}),
        ({"b", "a"}, ["a", "b"]),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (Path("/a"), "/a"),
        (torch.float16, "torch.float16"),
        (math.inf, math.inf),
        (random_flip, "random_flip"),
        (dict, "dict"),
        (
            functools.partial(random_crop, padding=2),
            {"function": "random_crop", "args": [], "keywords": {"padding": 2}},
        ),
        (Thing(Thing(1)), {"class": "Thing", "inner": {"class": "Thing", "inner": 1, "rng": {"class": "Generator"}}}),
    ],
)
def test_plain_values(value, expected):
    found = plain(value)
    if isinstance(value, Thing):
        del found["rng"]
        assert found["inner"]["inner"] == 1 and found["class"] == "Thing"
    else:
        assert found == expected and type(found) is type(expected)
    assert json.loads(json.dumps(found)) == found


def test_circles_end_and_nan_equals_itself():
    thing = Thing()
    thing.inner = thing
    json.dumps(plain(thing))
    assert first_difference({"seed": math.nan}, {"seed": math.nan}) is None
    assert first_difference({"seed": 1}, {"seed": True}) == ("seed", 1, True)
