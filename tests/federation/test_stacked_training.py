"""Clients that are trained at once end like clients one by one, but for rounding."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_fedmoe.data import FederatedDataset
from hf_fedmoe.federation.stacked_training import Stack, StackedTraining, by_client, clip_each_
from hf_fedmoe.strategies import FedMoE, FedMoESettings, FedProx, FedRep, Strategy
from hf_fedmoe.training import FederatedTrainer
from hf_fedmoe.weights import StateLayout
from tests.every_method import METHODS
from tests.tiny_federation import (
    assert_equal_states,
    interrupted_and_resumed,
    state,
    tiny_args,
    tiny_decoder,
    tiny_expert,
    tiny_federation,
    tiny_mixture,
    tiny_rows,
    with_padding,
)
from tests.tiny_images import tiny_cnn, tiny_image_federation, tiny_processor, tiny_resnet
from tests.tiny_models import tiny_bert, tiny_char_lstm


TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}
# Of what Adam trains on the server: alpha's gradient is small, and Adam divides it by itself.
SERVER_TOLERANCE = {"rtol": 1e-4, "atol": 5e-3}
# Batches of 4: four clients have three, of which the last lacks no, one or three rows; the others two and one.
SIZES = (12, 5, 11, 9, 12, 4)
AT_ONCE = 3


def uneven_federation():
    rows = tiny_rows(sum(SIZES) + 24)
    *clients, reserved = np.split(np.arange(len(rows)), np.cumsum(SIZES))
    return FederatedDataset(rows, clients, reserved=reserved)


def bert(attention):
    def make():
        model = tiny_expert()
        model.set_attn_implementation(attention)
        return model

    return make


def make_trainer(output_dir, at_once, model=tiny_expert, strategy=None, trainer_settings=None, **changes):
    # Some gradients are 0 but for rounding, which Adam would divide by itself.
    fields = {"clients_per_round": len(SIZES), "rounds": 2, "adam_epsilon": 1e-3, "clients_at_once": at_once}
    args = tiny_args(output_dir, **fields | changes)
    return FederatedTrainer(model(), args, uneven_federation(), strategy and strategy(), **(trainer_settings or {}))


RUNS = {
    "adam": {},
    "sgd": {
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "max_grad_norm": 0.05,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "lr_scheduler_type": "cosine",
    },
    "fedprox": {"strategy": lambda: FedProx(mu=5.0), "num_train_epochs": 2},
    "fedmoe": {"model": tiny_mixture, "strategy": FedMoE},
    "fedmoe, sums": {"model": tiny_mixture, "strategy": FedMoE, "client_parallelism": "sums"},
    "fedmoe, paper": {"model": tiny_mixture, "strategy": lambda: FedMoE(FedMoESettings(preset="paper"))},
    "lora": {"trainer_settings": {"peft_config": LoraConfig(r=4)}, "client_ranks": [4, 2]},
    "ffa": {"trainer_settings": {"peft_config": LoraConfig(r=4)}, "lora_fusion": "ffa"},
    "ia3": {"trainer_settings": {"peft_config": IA3Config()}},
    "sums": {"client_parallelism": "sums"},
    "workers": {"dataloader_num_workers": 1},
    "padded bert": {"trainer_settings": {"train_data_collator": with_padding}},
    "padded bert, eager": {"model": bert("eager"), "trainer_settings": {"train_data_collator": with_padding}},
    "padded gpt2": {"model": tiny_decoder, "trainer_settings": {"train_data_collator": with_padding}},
}

# Where the rate is the same in all steps, clients leave their group when they are through.
CONSTANT = {"lr_scheduler_type": "constant"}
UNEQUAL_STEPS = {
    "adam": CONSTANT,
    "momentum": CONSTANT
    | {"optim": "sgd", "optim_args": "momentum=0.9", "max_grad_norm": 0.05, "num_train_epochs": 2},
    "adagrad": CONSTANT | {"optim": "adagrad"},
    "rmsprop": CONSTANT | {"optim": "rmsprop", "learning_rate": 1e-3},
    "rate of the round": {"lr_scheduler_scope": "run"},
    "fedprox": CONSTANT | {"strategy": lambda: FedProx(mu=5.0), "num_train_epochs": 2},
    "lora": CONSTANT | {"trainer_settings": {"peft_config": LoraConfig(r=4)}},
    "sums": CONSTANT | {"client_parallelism": "sums"},
    "workers": CONSTANT | {"dataloader_num_workers": 1},
}


@pytest.fixture
def sizes_of_groups(monkeypatch):
    """Lists how many clients were trained at once, each time."""
    sizes = []
    train = StackedTraining.train

    def recording(self, tasks):
        payloads = train(self, tasks)
        sizes.append(len(tasks))
        return payloads

    monkeypatch.setattr(StackedTraining, "train", recording)
    return sizes


def trained(*args, **changes):
    run = make_trainer(*args, **changes)
    run.train()
    return run


def assert_alike(found, expected, tolerance=TOLERANCE):
    states = [state(run.model) for run in (found, expected)]
    on_server = {name for name in states[0] if name.startswith(("alpha_logit", "gate."))}
    for names, limits in ((states[0].keys() - on_server, tolerance), (on_server, SERVER_TOLERANCE)):
        assert_equal_states(*({name: tensors[name] for name in names} for tensors in states), **limits)
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (found, expected)]
    assert len(losses[0]) > 1 and losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert [report.bytes_up for report in found.rounds] == [report.bytes_up for report in expected.rounds]


@pytest.mark.parametrize("name", RUNS)
def test_clients_at_once_end_like_one_by_one(name, tmp_path, sizes_of_groups):
    found = trained(tmp_path / "at_once", AT_ONCE, **RUNS[name])
    assert sizes_of_groups == [3, 3]  # of four clients with three batches, in each round
    assert_alike(found, trained(tmp_path / "one_by_one", 1, **RUNS[name]))


@pytest.mark.parametrize("name", UNEQUAL_STEPS)
def test_clients_with_fewer_steps_leave_their_group(name, tmp_path, sizes_of_groups):
    found = trained(tmp_path / "at_once", AT_ONCE, **UNEQUAL_STEPS[name])
    assert sizes_of_groups == [3, 3] * 2  # all six clients, in each round
    expected = trained(tmp_path / "one_by_one", 1, **UNEQUAL_STEPS[name])
    # These divide gradients that are 0 but for rounding by themselves: steps of Adagrad are 1e-2 then.
    tolerances = {"adagrad": {"rtol": 1e-4, "atol": 1e-3}, "rmsprop": {"rtol": 1e-4, "atol": 1e-5}}
    assert_alike(found, expected, tolerances.get(name, TOLERANCE))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_whose_clients_only_train(name, tmp_path, sizes_of_groups):
    method = METHODS[name]

    def run(at_once):
        folder = tmp_path / str(at_once)
        args = tiny_args(folder, clients_per_round=4, rounds=2, clients_at_once=at_once, adam_epsilon=1e-3)
        run = FederatedTrainer(method.model(), args, tiny_federation(), method.strategy())
        run.train()
        return run

    if name in ("fedmix", "fedjets") or type(method.strategy()).train_client is not Strategy.train_client:
        with pytest.raises(ValueError, match=r"`clients_at_once` is 4, but .*(do more than train|cannot go through)"):
            run(4)
    else:
        assert_alike(run(4), run(1))
        assert sizes_of_groups == [4, 4]


@pytest.mark.parametrize("make", [tiny_cnn, tiny_resnet])
@pytest.mark.parametrize("client_size", [12, 10])
def test_images(make, client_size, tmp_path, sizes_of_groups):
    torch.manual_seed(1)
    start = state(make())

    def run(at_once):
        model = make()
        model.load_state_dict(start)
        args = tiny_args(tmp_path / str(at_once), clients_per_round=4, clients_at_once=at_once, adam_epsilon=1e-3)
        run = FederatedTrainer(
            model, args, tiny_image_federation(client_size=client_size), processing_class=tiny_processor()
        )
        run.train()
        return run

    assert_alike(run(4), run(1), {"rtol": 1e-4, "atol": 1e-5})
    assert sizes_of_groups == [4] * 3


def test_bf16(tmp_path, sizes_of_groups):
    found, expected = (trained(tmp_path / str(at_once), at_once, bf16=True) for at_once in (AT_ONCE, 1))
    assert_alike(found, expected, {"rtol": 1e-2, "atol": 1e-2})
    assert sizes_of_groups == [3, 3]


def test_groups_have_equally_many_steps_and_with_batchnorm_equal_batches(tmp_path):
    stacked = make_trainer(tmp_path, AT_ONCE)._federation().engine.stacked
    local = stacked.local
    assert stacked.groups(SIZES) == [[0, 2, 3], [4], [1], [5]]
    local.layout = SimpleNamespace(batchnorm=("statistics",))
    assert stacked.groups(SIZES) == [[0, 4], [2], [3], [1], [5]]
    local.args.gradient_accumulation_steps = 3
    local.layout.batchnorm = ()
    assert stacked.groups((12, 8, 4, 7)) == [[0], [1, 3], [2]]  # one step each, of three, two, one and two batches
    stacked.constant_rate = True
    assert stacked.groups((12, 8, 4, 7)) == [[0], [1, 3], [2]]
    local.args.gradient_accumulation_steps = 1
    assert stacked.groups((4, 12, 5, 11)) == [[1, 3, 2], [0]]


def test_a_client_that_fails_does_not_harm_those_beside_it(tmp_path, sizes_of_groups):
    def broken(rows):
        if any(row["input_ids"] == bad for row in rows):
            raise OSError("bad sector")
        return collate(rows)

    run = make_trainer(tmp_path / "at_once", AT_ONCE)
    bad, collate = run.federated_dataset.client(2)[3]["input_ids"], run.train_data_collator
    run.train_data_collator = broken
    run.train()
    assert [report.refused for report in run.rounds] == [{2: "OSError: bad sector"}] * 2 and not sizes_of_groups
    alone = make_trainer(tmp_path / "one_by_one", 1)
    alone.train_data_collator = broken
    alone.train()
    assert_equal_states(state(run.model), state(alone.model))


@pytest.mark.parametrize("at_once", [1, AT_ONCE])
def test_nothing_is_left_of_a_step_that_failed(at_once, tmp_path):
    """The next clients find the same, whether reading fails before the first or the second of its batches."""

    def run(failing):
        run = make_trainer(tmp_path, at_once, gradient_accumulation_steps=3, optim="sgd", learning_rate=0.1)
        collate, calls = run.train_data_collator, []

        def broken(rows):
            calls.append(rows)
            if len(calls) == failing:
                raise OSError("bad sector")
            return collate(rows)

        run.train_data_collator = broken
        run.train()
        return run

    # Before the first round two batches are tried out, of the clients and for validation, and one more at once.
    first = 3 if at_once == 1 else 4
    runs = [run(first), run(first + 1)]
    assert len(runs[0].rounds[0].refused) == (at_once == 1)
    assert_equal_states(*(state(run.model) for run in runs))


def test_a_model_that_is_not_finite_is_refused_alone(tmp_path, sizes_of_groups):
    class Poisoned(FedProx):
        def download(self, server, client, kept_P):
            return super().download(server, client, kept_P) * (1e30 if client == 2 else 1.0)

    runs = [trained(tmp_path / str(n), n, strategy=lambda: Poisoned(mu=0.0)) for n in (AT_ONCE, 1)]
    assert sizes_of_groups == [3, 3]
    for run in runs:
        assert [list(report.refused) for report in run.rounds] == [[2], [2]]
        run.rounds[0].bytes_up = run.rounds[1].bytes_up
    for entry in (entry for run in runs for entry in run.state.log_history):
        assert entry.get("loss") is None or entry["loss"] == entry["loss"]
    assert_equal_states(*(state(run.model) for run in runs), **TOLERANCE)


def test_dropout_differs_between_clients_and_follows_from_the_seed(tmp_path):
    def with_dropout():
        torch.manual_seed(7)
        return tiny_bert(3, hidden_dropout_prob=0.3)

    def make():
        return make_trainer(tmp_path / "resumed", AT_ONCE, model=with_dropout, rounds=4, save_strategy="steps")

    whole = trained(tmp_path / "whole", AT_ONCE, model=with_dropout, rounds=4)
    assert_equal_states(state(interrupted_and_resumed(make).model), state(whole.model))
    stacked = whole._federation().engine.stacked
    stack, local = stacked._stack, stacked.local
    stack.load([local.layout.read(local.worker)] * 2, [{}] * 2)
    stack.module.train()
    batch = with_padding(list(tiny_rows(4)))
    losses = stack.losses({name: torch.stack([tensor] * 2) for name, tensor in batch.items()})
    assert losses[0] != losses[1]


def test_rows_that_fill_up_have_no_label():
    batch = by_client({"labels": torch.arange(6), "x": torch.arange(12).view(6, 2)}, [3, 1])
    assert batch["labels"].tolist() == [[0, 1, 2], [3, -100, -100]]
    assert batch["x"].tolist() == [[[0, 1], [2, 3], [4, 5]], [[6, 7], [8, 9], [10, 11]]]


def test_gradients_are_clipped_by_client():
    torch.manual_seed(0)
    clients = [[nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(()))] for _ in range(3)]
    stacked = [nn.Parameter(torch.zeros(3, 2, 3)), nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3, 1))]
    for weight in stacked[:2]:
        weight.grad = torch.randn_like(weight) * torch.tensor([0.1, 1.0, 10.0]).view(3, *[1] * (weight.dim() - 1))
    for index, weights in enumerate(clients):
        for weight, weight_n in zip(weights, stacked[:2], strict=True):
            weight.grad = weight_n.grad[index].clone()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
    clip_each_(stacked, 1.0)
    for index, weights in enumerate(clients):
        for weight, weight_n in zip(weights, stacked[:2], strict=True):
            torch.testing.assert_close(weight_n.grad[index], weight.grad)
    assert stacked[2].grad is None


class Classifier(nn.Module):
    """Means of embeddings, padding included."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 3, padding_idx=0)

    def forward(self, input_ids, labels):
        logits = self.embedding(input_ids).mean(1)
        return SequenceClassifierOutput(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


def test_nothing_is_learned_from_padding():
    torch.manual_seed(0)
    model = Classifier()
    batch = {"input_ids": torch.tensor([[1, 0, 2], [3, 0, 0]]), "labels": torch.tensor([0, 2])}
    model(**batch).loss.backward()
    layout = StateLayout.of(model)
    stack = Stack(Classifier(), layout)
    stack.load([layout.read(model)] * 2, [{}] * 2)
    stack.backward(stack.losses({name: torch.stack([tensor] * 2) for name, tensor in batch.items()}).sum())
    for grad in stack.weights["embedding.weight"].grad:
        torch.testing.assert_close(grad, model.embedding.weight.grad)
    assert not model.embedding.weight.grad[0].any() and model.embedding.weight.grad[1].any()


@pytest.mark.parametrize("make", [tiny_expert, tiny_decoder], ids=["bert", "gpt2"])
def test_no_fused_attention_goes_through_vmap(make):
    """A GPU refuses it, and a CPU takes it apart."""

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **kwargs or {})

    def fused():
        return [name for name in names if "scaled_dot_product" in name]

    names, model = [], make()
    assert model.config._attn_implementation == "sdpa"
    batch = with_padding(list(tiny_rows(4)))
    with Recorder():
        model(**batch).loss.backward()
    assert fused()  # one by one it stays
    names.clear()
    layout = StateLayout.of(model)
    stack = Stack(make(), layout)
    stack.load([layout.read(model)] * 2, [{}] * 2)
    with Recorder():
        stack.backward(stack.losses({name: torch.stack([tensor] * 2) for name, tensor in batch.items()}).sum())
    assert names and not fused()


def test_models_that_cannot_be_stacked_are_refused_before_the_first_round(tmp_path):
    with pytest.raises(ValueError, match=r"`clients_at_once` is 3, but the CharLSTM.*lstm.*Set it to 1\."):
        make_trainer(tmp_path, AT_ONCE, model=lambda: tiny_char_lstm(3)).train()

    class CountsEveryRow(BertForSequenceClassification):
        def forward(self, input_ids, attention_mask=None, labels=None):
            logits = super().forward(input_ids, attention_mask).logits
            return SequenceClassifierOutput(loss=(logits.sum(-1) + labels).mean(), logits=logits)

    with pytest.raises(ValueError, match=r"the CountsEveryRow has the losses \[.*\] together and \[.*\] alone"):
        make_trainer(tmp_path, AT_ONCE, model=lambda: CountsEveryRow(tiny_expert().config)).train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": FedRep}, "clients of 'fedrep' do more than train one model by its own loss: set it to 1"),
        ({"client_parallelism": "data"}, "`client_parallelism` is 'data', where all processes train one client"),
        ({"keep_client_optimizer": True}, "`keep_client_optimizer` is True, which is for clients one by one"),
        ({"torch_compile": True}, "`torch_compile` is True"),
        ({"optim": "adafactor"}, "`optim` is 'adafactor', and only optimizers that treat each weight by itself"),
    ],
)
def test_settings_that_are_for_clients_one_by_one(changes, message, tmp_path):
    with pytest.raises(ValueError, match=f"`clients_at_once` is 3, but {message}"):
        make_trainer(tmp_path, AT_ONCE, **changes)
