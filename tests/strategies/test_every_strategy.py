"""Tests of every strategy; tests/every_method.py says how each is run."""

import csv
import importlib
import inspect

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification

from hf_fedmoe import strategies
from hf_fedmoe.data import AUGMENTATIONS, ImageCollator, hold_out_client_tests
from hf_fedmoe.strategies import Strategy
from hf_fedmoe.training import FederatedTrainer
from tests.every_method import METHODS, image_model, trained
from tests.tiny_federation import assert_equal_states, state, tiny_args, tiny_federation, tiny_rows
from tests.tiny_images import runs_at_risk, tiny_image_federation, tiny_processor


def test_each_has_an_entry():
    exported = [vars(strategies)[name] for name in strategies.__all__]
    classes = {kind for kind in exported if isinstance(kind, type) and issubclass(kind, Strategy)}
    assert {type(method.strategy()) for method in METHODS.values()} == classes - {
        Strategy,
        strategies.Owners,  # of language models: tests/training/test_owners_of_text.py
    }


@pytest.mark.parametrize("name", METHODS)
def test_each_has_a_setting_at_which_it_equals_another(name):
    path, test = METHODS[name].limit.split("::")
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    assert callable(vars(module)[test]) and type(METHODS[name].strategy()).__name__ in inspect.getsource(module)


@pytest.fixture(scope="module", params=METHODS)
def run(request, tmp_path_factory):
    """A name and its run, which tests leave as it is."""
    return request.param, trained(tmp_path_factory.mktemp(request.param), request.param)


def assert_communication(name, trainer, start):
    """`start` is the server's model before the run."""
    method = METHODS[name]
    for round_index, report in enumerate(trainer.rounds):
        sound = [client for client in report.clients if client not in report.refused]
        assert report.bytes_down == method.received_by(report.clients, trainer, round_index)
        assert report.bytes_up == method.sent_by(sound, trainer, round_index)
    end = state(trainer.model)
    changed = {key for key in start if not torch.equal(start[key], end[key])}
    assert not any(key.startswith(method.stays) for key in changed)
    assert changed or "" in method.stays


def logits(model):
    rows = tiny_rows(7, seed=8)
    with torch.no_grad():
        return model.eval()(**{key: torch.tensor(rows[key]) for key in ("input_ids", "attention_mask")}).logits


def test_bytes_are_those_of_what_must_travel(run):
    name, trainer = run
    assert not any(report.refused for report in trainer.rounds)
    assert_communication(name, trainer, state(METHODS[name].model()))


def test_the_saved_model_is_loaded_with_its_bits(run, tmp_path):
    _, trainer = run
    trainer.save_model(str(tmp_path))
    trainer.create_model_card(folder=tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is type(trainer.model) and torch.equal(logits(loaded), logits(trainer.model))
    assert f"`{trainer.strategy.name}`" in (tmp_path / "README.md").read_text()


def test_each_client_is_evaluated(run):
    _, trainer = run
    before = state(trainer.model)
    metrics = trainer.evaluate_clients()
    assert trainer.evaluate_clients() == metrics  # evaluation changes nothing
    assert_equal_states(state(trainer.model), before)
    table = trainer.client_table
    assert [(row.client, row.unseen, row.test_size) for row in table] == [(c, c == 3, 3) for c in range(4)]
    seen = [row.accuracy for row in table[:3]]
    assert metrics["clients_accuracy"] == pytest.approx(np.mean(seen)) and metrics["clients_worst"] == min(seen)
    assert metrics["clients_unseen_accuracy"] == table[3].accuracy
    with open(f"{trainer.args.output_dir}/_client_metrics.csv") as file:
        assert [float(row["accuracy"]) for row in csv.DictReader(file)] == [*seen, table[3].accuracy]
    assert trainer.state.log_history[-1]["clients_bottom_decile"] == metrics["clients_bottom_decile"]


def pointers(model) -> set[int]:
    return {tensor.data_ptr() for tensor in model.state_dict().values()}


def test_a_known_client_gets_its_own_model_and_a_new_one_what_an_unseen_one_does(run, tmp_path):
    name, trainer = run
    before, frozen = state(trainer.model), {n for n, p in trainer.model.named_parameters() if not p.requires_grad}
    known = trainer._federation_of_the_last_round()
    used = []
    for client in (0, 3):  # one after the other in one worker
        model = known.personal_model(client)
        assert (model is not trainer.model) == METHODS[name].personal
        used.append((type(model), state(model)))
    own = [trainer.personalize(client) for client in (0, 3, trainer.federated_dataset.client(3))]
    for model, (kind, expected) in zip(own, [*used, used[1]], strict=True):
        assert_equal_states(state(model), expected)
        assert type(model) is kind and not any(module.training for module in model.modules())
        assert {n for n, p in model.named_parameters() if not p.requires_grad} == frozen
    # Nobody else's memory, not even one another's.
    memory = [pointers(trainer.model), pointers(known.server.worker), *map(pointers, own)]
    assert sum(map(len, memory)) == len(set.union(*memory))
    assert_equal_states(state(trainer.model), before)
    for model in own[:2]:
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("name", METHODS)
def test_equal_seeds_give_equal_bits(tmp_path, name):
    """Trains with normalisation layers and augmentation."""
    data = hold_out_client_tests(tiny_image_federation(), unseen_share=0.25)
    evaluated, models = [], []
    for folder in ("first", "second"):
        torch.rand(3)  # whatever happened before must not matter
        trainer = FederatedTrainer(
            image_model(name),
            tiny_args(tmp_path / folder, rounds=2),
            data,
            strategy=(METHODS[name].image_strategy or METHODS[name].strategy)(),
            processing_class=tiny_processor(),
            train_data_collator=ImageCollator(tiny_processor(), AUGMENTATIONS["photographs"]),
        )
        with runs_at_risk() as risks:
            trainer.train()
            evaluated.append(trainer.evaluate_clients())
        assert not risks  # a narrow convolution that may abort on some CPUs
        assert not any(report.refused for report in trainer.rounds)
        federation = trainer._federation_of_the_last_round()
        models.append([state(trainer.model), *(state(federation.personal_model(client)) for client in range(4))])
    assert_communication(name, trainer, state(image_model(name)))
    assert evaluated[0] == evaluated[1]
    for first, second in zip(*models, strict=True):
        assert_equal_states(first, second)
        variances = [tensor for key, tensor in first.items() if key.endswith("running_var")]
        assert variances and all((variance > 0).all() for variance in variances)


@pytest.mark.parametrize("name", METHODS)
def test_failing_clients_are_survived(tmp_path, name):
    data = hold_out_client_tests(tiny_federation())
    strategy = METHODS[name].strategy()
    train_client = strategy.train_client

    def broken(local, task):
        payload, kept = train_client(local, task)
        if task.client == 0:
            raise OSError("battery empty")
        if task.client == 1:
            payload.row_P[0] = float("nan")
            kept = {key: tensor * float("nan") for key, tensor in kept.items()}
        return payload, kept

    strategy.train_client = broken
    args = tiny_args(tmp_path, rounds=2, clients_per_round=4)
    trainer = FederatedTrainer(METHODS[name].model(), args, data, strategy=strategy)
    trainer.train()
    # Local sends nothing that could be refused; it keeps nothing of such a training either.
    for report in trainer.rounds:
        assert report.refused.keys() == {0, 1}
        assert "battery empty" in report.refused[0] and "not finite" in report.refused[1]
    assert_communication(name, trainer, state(METHODS[name].model()))
    assert all(torch.isfinite(tensor).all() for tensor in state(trainer.model).values())
    store = trainer._federation_of_the_last_round().store
    assert store.get(0) == store.get(1) == {}
    strategy.train_client = train_client
    assert np.isfinite(list(trainer.evaluate_clients().values())).all()


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.strategy().needs == "mean"])
def test_uploads_may_be_added_up_as_they_come(tmp_path, name):
    data = hold_out_client_tests(tiny_image_federation(), unseen_share=0.25)
    runs = []
    for parallelism in ("clients", "sums"):
        strategy = (METHODS[name].image_strategy or METHODS[name].strategy)()
        train_client = strategy.train_client

        def failing(local, task, train_client=train_client):
            payload, kept = train_client(local, task)
            if task.client == 1:
                payload.row_P.fill_(float("nan"))
            return payload, kept

        strategy.train_client = failing
        # Plain gradients: rounding errors stay what they are.
        changes = dict(rounds=2, clients_per_round=3, client_parallelism=parallelism, optim="sgd", max_grad_norm=0.0)
        args = tiny_args(tmp_path / parallelism, **changes)
        trainer = FederatedTrainer(image_model(name), args, data, strategy=strategy, processing_class=tiny_processor())
        trainer.train()
        assert [report.refused.keys() for report in trainer.rounds] == [{1}] * 2
        runs.append(trainer)
    assert [a.bytes_up for a in runs[0].rounds] == [b.bytes_up for b in runs[1].rounds]
    for models in zip(*([t.model, t.personalize(0), t.personalize(3)] for t in runs), strict=True):
        assert_equal_states(*map(state, models), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("fusion", ["svd", "factors", "ffa"])
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.adapters])
def test_clients_of_adapters(tmp_path, name, fusion):
    data = hold_out_client_tests(tiny_federation(), unseen_share=0.25)
    args = tiny_args(tmp_path, rounds=2, lora_fusion=fusion)
    config = LoraConfig(r=2, target_modules=["query"])
    trainer = FederatedTrainer(
        METHODS[name].model(), args, data, strategy=METHODS[name].strategy(), peft_config=config
    )
    trainer.train()
    assert not any(report.refused for report in trainer.rounds)
    assert np.isfinite(list(trainer.evaluate_clients().values())).all()
