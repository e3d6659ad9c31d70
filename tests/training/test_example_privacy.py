"""DP-SGD at clients by Opacus: its gradients, its accounting, the stop, resuming, what is told and what is refused."""

import copy
import json
import math
import sys

import dp_accounting as dp
import numpy as np
import pytest
import torch
from dp_accounting.rdp import RdpAccountant
from peft import LoraConfig
from torch import nn

from hf_fedmoe.data import FederatedDataset
from hf_fedmoe.deployment.message_engine import MessageEngine
from hf_fedmoe.federation import ExamplePrivacy, Federation, PoissonDraw, Stream, poisson_draw, seed_of
from hf_fedmoe.strategies import APFL, FedAvg, FedMix, FedMoE, FedProx, Scaffold
from hf_fedmoe.training import FederatedTrainer
from hf_fedmoe.training.example_budget import SPENT, SPENT_FILE, ExampleBudget
from hf_fedmoe.training.readers import Reader
from tests.tiny_federation import (
    assert_equal_states,
    interrupted_and_resumed,
    state,
    timeless,
    tiny_args,
    tiny_decoder,
    tiny_expert,
    tiny_federation,
    tiny_mixture,
)
from tests.tiny_images import tiny_cnn, tiny_image_federation, tiny_processor, tiny_resnet
from tests.tiny_models import tiny_bert, tiny_char_lstm


pytest.importorskip("opacus", reason="example-level privacy is by Opacus: pip install 'hf_fedmoe[test]'")

HIDDEN = {"example_noise_multiplier": 1.0, "example_clipping_norm": 0.5, "example_delta": 1e-2, "noise_source": "seed"}
FOUND = HIDDEN | {"example_noise_multiplier": None, "example_target_epsilon": 3.0}


def trainer(folder, strategy=None, data=None, model=None, **changes):
    args = tiny_args(folder, **HIDDEN | changes)
    return FederatedTrainer(model or tiny_expert(), args, data or tiny_federation(), strategy)


def budget(folder, client_sizes=(12,) * 4, **changes):
    made = tiny_args(folder, **HIDDEN | changes)
    return ExampleBudget(made, client_sizes)


# The gradients


def alone(folder, kind, **changes):
    """Makes a trainer of one client with 12 rows, for one round of plain gradient descent."""
    data = tiny_image_federation(1) if kind == "cnn" else tiny_federation(1)
    torch.manual_seed(5)
    model = {"cnn": tiny_cnn, "gpt2": tiny_decoder}.get(kind.split()[0], tiny_expert)()
    peft_config = None
    if "lora" in kind:
        peft_config = LoraConfig(r=2, fan_in_fan_out="gpt2" in kind, init_lora_weights="gaussian")
    plain = {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 0.1, "max_grad_norm": 0, "rounds": 1}
    args = tiny_args(folder, **{"clients_per_round": 1, "lora_fusion": "factors"} | plain | changes)
    processor = tiny_processor() if kind == "cnn" else None
    return FederatedTrainer(model, args, data, peft_config=peft_config, processing_class=processor)


def descended_by_hand(run, z, norm):
    """Does a client's steps row by row; returns the parameters, and how many gradients were shortened or not."""
    args, model = run.args, copy.deepcopy(run.model).train()
    rows, seed = run._columns_of_clients(), seed_of(args.seed, Stream.LOCAL_TRAINING, 0, 0)
    privacy, draw = ExamplePrivacy(z, norm, "seed"), poisson_draw(12, args)
    normals, learning = privacy.normals(seed), [p for p in model.parameters() if p.requires_grad]
    shortened = []
    steps = privacy.steps(draw, 12, seed)
    for step in steps:
        totals = [torch.zeros_like(parameter) for parameter in learning]
        for row in step[0] if step else []:
            loss = model(**run.train_data_collator([rows[row]])).loss
            gradients = torch.autograd.grad(loss, learning)
            length = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
            shortened.append(length > norm)
            for total, gradient in zip(totals, gradients, strict=True):
                total += gradient * min(1.0, norm / (length + 1e-6))  # as Opacus does
        with torch.no_grad():
            for parameter, total in zip(learning, totals, strict=True):
                noise = normals(parameter.numel()).view_as(parameter).float() if z else 0.0
                parameter -= args.learning_rate * (total + z * norm * noise) / draw.expected
    return state(model), shortened, steps


@pytest.mark.parametrize(
    ("kind", "z", "norm"),
    [("cnn", 0.7, 1.0), ("bert", 0.7, 2.0), ("gpt2", 0.7, 4.0), ("bert lora", 0.0, 0.857), ("gpt2 lora", 0.0, 2.0)],
)
def test_each_gradient_is_shortened_and_each_step_has_noise(kind, z, norm, tmp_path):
    private = {"example_noise_multiplier": z, "example_clipping_norm": norm, "example_delta": 1e-2}
    run = alone(tmp_path, kind, **private, noise_source="seed", per_device_train_batch_size=2, num_train_epochs=3)
    before = state(run.model)
    expected, shortened, steps = descended_by_hand(run, z, norm)
    run.train()
    assert_equal_states(state(run.model), expected, atol=1e-5, rtol=1e-4)
    assert any(not torch.allclose(expected[name], before[name], atol=1e-3) for name in before)
    assert True in shortened and False in shortened
    assert len(steps) == 18 and [] in steps and max(len(step[0]) for step in steps if step) > 2


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
@pytest.mark.parametrize("strategy", [FedAvg(), FedProx(mu=0.5)], ids=["fedavg", "fedprox"])
def test_without_noise_and_bound_clients_train_as_ever(optim, strategy, tmp_path):
    # Batches of all rows are the same whoever draws them; Opacus adds their gradients in another order than autograd.
    plain = {"optim": optim, "per_device_train_batch_size": 12, "max_grad_norm": 0, "num_train_epochs": 3}
    plain |= {"adam_epsilon": 1e-3, "weight_decay": 0.1, "learning_rate": 0.02}
    ever = FederatedTrainer(tiny_expert(), tiny_args(tmp_path, **plain), tiny_federation(), strategy)
    ever.train()
    unbounded = {"example_noise_multiplier": 0.0, "example_clipping_norm": math.inf}
    private = FederatedTrainer(tiny_expert(), tiny_args(tmp_path, **plain | unbounded), tiny_federation(), strategy)
    private.train()
    assert_equal_states(state(private.model), state(ever.model), atol=2e-6, rtol=1e-5)
    assert not any("example_epsilon" in entry for entry in private.state.log_history)


def test_a_draw_has_as_many_steps_as_without_privacy_and_each_row_equally_often(tmp_path):
    args = tiny_args(tmp_path, per_device_train_batch_size=4, num_train_epochs=2)
    assert poisson_draw(12, args) == (1 / 3, 6, 4)
    assert poisson_draw(13, args) == (4 / 13, 8, 4)
    assert poisson_draw(3, args) == (1.0, 2, 3)
    privacy = ExamplePrivacy(1.0, 1.0, "system")
    steps = privacy.steps(poisson_draw(12, args)._replace(steps=6000), 12, seed=0)
    counts = torch.bincount(torch.tensor([row for step in steps for batch in step for row in batch]), minlength=12)
    # 2000 each, with a deviation of sqrt(6000 * 2 / 9) = 37.
    assert ((counts - 2000).abs() < 5 * 37).all()
    sizes = torch.tensor([float(len(step[0])) if step else 0.0 for step in steps])
    assert sizes.var().item() == pytest.approx(12 * 2 / 9, rel=0.1)  # of a binomial, not of batches of a size


@pytest.mark.parametrize("source", ["system", "seed"])
def test_who_is_in_a_batch_and_its_noise_follow_from_the_seed_only_if_asked(source):
    # Epsilon counts on both being unknown.
    privacy, draw = ExamplePrivacy(1.0, 1.0, source), PoissonDraw(0.5, 20, 6)
    first, second = (privacy.steps(draw, 12, seed=0) for _ in range(2))
    assert (first == second) == (source == "seed") and privacy.steps(draw, 12, seed=1) != first
    first, second = (privacy.normals(0)(20) for _ in range(2))
    assert torch.equal(first, second) == (source == "seed") and not torch.equal(privacy.normals(1)(20), first)


def huge_loss_of_class_2(outputs, labels, num_items_in_batch=None):
    losses = nn.functional.cross_entropy(outputs.logits, labels, reduction="none")
    return (losses * torch.where(labels == 2, math.inf, 1.0)).mean()


@pytest.mark.parametrize("z", [1.0, 0.0])
def test_a_row_whose_gradient_is_not_finite_moves_nothing(z, tmp_path, monkeypatch):
    # Its upload would be refused, which tells everybody that the row is there.
    data = tiny_federation(1)
    labels = torch.tensor(data.pool["label"])[data.client_rows(0)]
    finite = torch.nonzero(labels != 2).flatten().tolist()

    def run(batch):
        # The trial sees none of the rows at fault.
        seen = [int(data.client_rows(0)[place]) for place in finite[:3]]
        monkeypatch.setattr(Reader, "extremes", lambda reader: seen[:2])
        monkeypatch.setattr("hf_fedmoe.training.trial.telling_rows", lambda reader: seen)
        monkeypatch.setattr(ExamplePrivacy, "steps", lambda self, draw, count, seed: [[batch if count == 12 else [0]]])
        args = tiny_args(tmp_path, **HIDDEN | {"example_noise_multiplier": z, "clients_per_round": 1, "rounds": 1})
        made = FederatedTrainer(tiny_expert(), args, data, compute_loss_func=huge_loss_of_class_2)
        made.train()
        return state(made.model)

    if z:
        assert 0 < len(finite) < 12
        assert_equal_states(run([*range(12)]), run(finite), atol=1e-6, rtol=1e-6)
    else:  # nothing is hidden, and a fault of the loss must show
        with pytest.raises(RuntimeError, match="sent a sound model"):
            run([*range(12)])


def test_a_client_that_breaks_off_leaves_nothing_behind(tmp_path, monkeypatch):
    whole = trainer(tmp_path, rounds=1)
    whole.train()
    broken = trainer(tmp_path, rounds=1)
    first = Federation.run_round

    def run_round(self, *args):
        worker, local = self.local_trainer.worker, self.local_trainer
        local.begin(self.server.bank_SP[0], self.server.integers[0], 1)
        batch = broken.train_data_collator([broken._columns_of_clients()[row] for row in range(3)])
        loss = worker(**batch).loss
        worker(**batch)  # never goes back
        loss.backward()
        return first(self, *args)

    monkeypatch.setattr(Federation, "run_round", run_round)
    broken.train()
    assert broken.rounds[0].refused == {}
    assert_equal_states(state(broken.model), state(whole.model))


# Epsilon


def test_epsilon_is_that_of_dp_accounting_and_of_opacus(tmp_path):
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp.rdp_privacy_accountant import DEFAULT_RDP_ORDERS
    from opacus.accountants import RDPAccountant

    event = dp.PoissonSampledDpEvent(4 / 12, dp.GaussianDpEvent(1.0))
    found = budget(tmp_path).epsilon([5, 2, 0, 1])
    assert found == RdpAccountant().compose(event, 5 * 3).get_epsilon(1e-2) and 1 < found < 10
    opacus = RDPAccountant()
    for _ in range(5 * 3):
        opacus.step(noise_multiplier=1.0, sample_rate=4 / 12)
    whole = range(2, 64)
    by_whole_orders = RdpAccountant(whole).compose(event, 5 * 3).get_epsilon(1e-2)
    assert by_whole_orders == pytest.approx(opacus.get_epsilon(1e-2, alphas=whole), abs=1e-6)
    # At orders between them dp-accounting bounds from above what Opacus computes (of order 2.2, by quadrature:
    # 0.204611, and so by Opacus; by dp-accounting 0.205934).
    theirs = opacus.get_epsilon(1e-2, alphas=DEFAULT_RDP_ORDERS)
    assert theirs <= found <= 1.01 * theirs
    tight = budget(tmp_path, privacy_accountant="pld").epsilon([5, 2, 0, 1])
    assert tight == PLDAccountant().compose(event, 15).get_epsilon(1e-2) < found


def test_a_client_of_few_rows_has_all_of_them_in_each_step(tmp_path):
    event = dp.GaussianDpEvent(1.0)
    assert budget(tmp_path, [3, 3]).epsilon([4, 1]) == RdpAccountant().compose(event, 4).get_epsilon(1e-2)


# Who has most steps costs most, or who has few rows, each in every batch.
@pytest.mark.parametrize(("rounds", "worst"), [([1, 0, 2, 4, 3, 9, 8, 50], 100), ([10, 0, 2, 1, 1, 1, 1, 1], 3)])
def test_the_worst_client_is_told(rounds, worst, tmp_path):
    sizes = [3, 4, 5, 8, 9, 30, 31, 100]
    asked = budget(tmp_path, sizes, num_train_epochs=2)
    alone = [budget(tmp_path, [n], num_train_epochs=2).epsilon([k]) for n, k in zip(sizes, rounds, strict=True)]
    assert asked.epsilon(rounds) == max(alone) == alone[sizes.index(worst)] and alone[1] == 0
    assert len(set(alone)) == len(sizes)


@pytest.mark.parametrize(("accountant", "sizes"), [("rdp", [5, 12, 40]), ("pld", [4])])
def test_the_noise_is_the_least_with_which_every_client_may_be_in_all_rounds(accountant, sizes, tmp_path):
    changes = {"privacy_accountant": accountant, "rounds": 5}
    every, z = [5] * len(sizes), budget(tmp_path, sizes, **FOUND | changes).find_noise()
    assert budget(tmp_path, sizes, example_noise_multiplier=z, **changes).epsilon(every) <= 3.0
    assert budget(tmp_path, sizes, example_noise_multiplier=z - 0.01, **changes).epsilon(every) > 3.0


def test_the_least_noise_where_the_target_is_far_away(tmp_path):
    for accountant in ("rdp", "pld"):
        asked = budget(tmp_path, **FOUND | {"example_target_epsilon": 1e5, "privacy_accountant": accountant})
        assert asked.find_noise() == 0.05


# A run


def test_rounds_of_a_client_add_up(tmp_path, monkeypatch):
    drawn = iter([[0, 1], [1, 2], [1, 3]])
    monkeypatch.setattr(Federation, "draw", lambda *args: next(drawn))
    run = trainer(tmp_path, save_strategy="steps")
    run.train()
    event = dp.PoissonSampledDpEvent(4 / 12, dp.GaussianDpEvent(1.0))
    expected = [RdpAccountant().compose(event, 3 * k).get_epsilon(1e-2) for k in (1, 2, 3)]
    assert [entry["example_epsilon"] for entry in run.state.log_history if "bytes_up" in entry] == expected
    assert run._left[0][SPENT].tolist() == [1.0, 1.0, 3.0, 1.0, 1.0]
    assert json.loads((tmp_path / SPENT_FILE).read_text()) == {"noise_multiplier": 1.0, "rounds": [1, 3, 1, 1]}


def test_the_loss_of_a_client_is_told_to_nobody(tmp_path):
    run = trainer(tmp_path)
    run.train()
    assert all(math.isnan(report.loss) and not report.refused for report in run.rounds)
    assert not any({"loss", "train_loss"} & entry.keys() for entry in run.state.log_history)


@pytest.mark.parametrize("source", ["system", "seed"])
def test_equal_seeds_give_equal_bits_but_not_of_the_system(source, tmp_path):
    runs = [trainer(tmp_path / str(n), rounds=1, noise_source=source) for n in range(2)]
    for run in runs:
        run.train()
    first, second = (state(run.model) for run in runs)
    if source == "seed":
        assert_equal_states(first, second)
    else:
        assert not torch.allclose(first["classifier.weight"], second["classifier.weight"], atol=1e-3)


@pytest.mark.parametrize("source", ["system", "seed"])
def test_masks_of_dropout_are_known_to_nobody_but_by_the_seed(source, tmp_path):
    # Each row has the masks of its place: known ones would tell who is missing before it.
    model = tiny_bert(3, hidden_dropout_prob=0.5)
    clipped = {"example_noise_multiplier": 0.0, "example_clipping_norm": 1e3, "noise_source": source}
    everybody = {"per_device_train_batch_size": 12, "rounds": 1}  # the same rows in each step, and no noise
    runs = [trainer(tmp_path / str(n), model=copy.deepcopy(model), **clipped | everybody) for n in range(2)]
    for run in runs:
        run.train()
    first, second = (state(run.model)["classifier.weight"] for run in runs)
    assert torch.equal(first, second) == (source == "seed")


def test_a_resumed_run_has_the_same_bits_and_counts_on(tmp_path):
    whole = trainer(tmp_path / "whole", save_strategy="steps", **FOUND)
    whole.train()
    resumed = interrupted_and_resumed(lambda: trainer(tmp_path / "parts", save_strategy="steps", **FOUND))
    assert_equal_states(state(resumed.model), state(whole.model))
    assert timeless(resumed.state.log_history)[:3] == timeless(whole.state.log_history)[:3]
    assert torch.equal(resumed._left[0][SPENT], whole._left[0][SPENT])
    with pytest.raises(ValueError, match=r"example_clipping_norm = 0\.5, this run has 0\.6"):
        trainer(tmp_path / "parts", save_strategy="steps", **FOUND | {"example_clipping_norm": 0.6}).train(
            resume_from_checkpoint=True
        )


def test_a_round_that_was_broken_off_counts(tmp_path):
    run = trainer(tmp_path, save_strategy="steps", clients_per_round=4)
    run.train()
    again = trainer(tmp_path, save_strategy="steps", clients_per_round=4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))  # as if round 3 had been broken off
    assert again._left[0][SPENT].tolist() == [1.0, 4.0, 4.0, 4.0, 4.0]
    again.train()  # once more, on the same rows
    assert again._left[0][SPENT].tolist() == [1.0, 7.0, 7.0, 7.0, 7.0]


def test_a_run_stops_before_a_client_overspends(tmp_path):
    changes = FOUND | {"save_strategy": "steps", "clients_per_round": 4}
    first = trainer(tmp_path, **changes | {"rounds": 2})
    first.train()
    z = first._left[0][SPENT][0].item()
    more = trainer(tmp_path, **changes | {"rounds": 5})
    more.train(resume_from_checkpoint=True)  # with the noise of two rounds
    assert more.rounds == [] and more._left[0][SPENT].tolist() == [z, 2.0, 2.0, 2.0, 2.0]
    assert 2.9 < budget(tmp_path, example_noise_multiplier=z).epsilon([2] * 4) <= 3.0


def test_a_first_round_that_costs_too_much_is_no_run(tmp_path):
    message = (
        r"`example_target_epsilon` is 0\.1, but with `example_noise_multiplier` 1 the first round costs a client 2\.45"
    )
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, example_target_epsilon=0.1).train()


@pytest.mark.parametrize(
    ("began", "changes"),
    [
        (HIDDEN, {"example_noise_multiplier": 9.0}),
        (HIDDEN, {"per_device_train_batch_size": 1}),
        (HIDDEN, {"num_train_epochs": 0.5}),
        (FOUND, {"rounds": 9}),
    ],
)
def test_earlier_rounds_of_a_trainer_are_not_counted_as_others(began, changes, tmp_path):
    run = trainer(tmp_path, **began | {"rounds": 1})
    run.train()
    for name, value in changes.items():
        setattr(run.args, name, value)
    with pytest.raises(ValueError, match=r"This trainer has trained with .* and would with"):
        run.train()


def test_the_card_says_what_holds_of_examples_and_of_clients(tmp_path):
    def card(folder, **changes):
        run = trainer(folder, rounds=1, **changes)
        run.train()
        run.create_model_card()
        return (folder / "README.md").read_text(), run.state.log_history[0]

    text, log = card(tmp_path / "examples", noise_source="system")
    assert f"({log['example_epsilon']:.3g}, 0.01)-differentially private for adding or leaving out one of its" in text
    assert "against the server too" in text and "can be given" not in text and "epsilon" not in log
    clients = {"noise_multiplier": 1.0, "clipping_norm": 1.0, "delta": 1e-3, "client_choice": "poisson"}
    text, log = card(tmp_path / "both", noise_source="system", **clients)
    assert "one of its" in text and f"({log['epsilon']:.3g}, 0.001)-differentially private for adding or" in text
    assert log["epsilon"] != log["example_epsilon"]
    text, _ = card(tmp_path / "seed")
    assert "no bound on that (epsilon) can be given" in text and "DP-SGD" not in text


def test_experts_of_a_mixture_are_trained_so_too(tmp_path):
    run = trainer(tmp_path, FedMoE(), model=tiny_mixture(), rounds=1)
    run.train()
    assert run.rounds[0].refused == {} and run.state.log_history[0]["example_epsilon"] > 1


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"example_noise_multiplier": None}, "`example_delta` is 0.01, which hides no example by itself"),
        ({"example_noise_multiplier": -1.0}, "`example_noise_multiplier` is -1.0"),
        ({"example_target_epsilon": 0.0}, "`example_target_epsilon` is 0.0"),
        ({"example_clipping_norm": None}, "`example_clipping_norm` is None"),
        ({"example_clipping_norm": math.inf}, "`example_clipping_norm` is inf"),
        ({"example_noise_multiplier": 0.0, "example_target_epsilon": 2.0}, "without noise there is no epsilon"),
        ({"example_delta": None}, "`example_delta` is None"),
        ({"example_delta": 1.0}, "`example_delta` is 1.0"),
        ({"gradient_accumulation_steps": 2}, "`gradient_accumulation_steps` is 2, but clients train by DP-SGD"),
        ({"keep_client_optimizer": True}, "`keep_client_optimizer` is True"),
        ({"clients_at_once": 2}, "`clients_at_once` is 2"),
        ({"bf16": True}, "`bf16` is True"),
        ({"dataloader_num_workers": 1}, "`dataloader_num_workers` is 1"),
        ({"dataloader_drop_last": True}, "`dataloader_drop_last` is True"),
        ({"torch_compile": True}, "`torch_compile` is True"),
        ({"gradient_checkpointing": True}, "`gradient_checkpointing` is True"),
        ({"client_parallelism": "data"}, "`client_parallelism` is 'data'"),
    ],
)
def test_arguments_that_contradict_one_another(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tiny_args(tmp_path, **HIDDEN | changes)


def test_the_precision_of_the_launcher_counts_too(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match="`mixed_precision` is 'bf16', but clients train by DP-SGD"):
        tiny_args(tmp_path, **HIDDEN)


def test_methods_models_and_clients_whose_examples_cannot_be_hidden(tmp_path):
    def refused(message, model=None, strategy=None, **changes):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, strategy, model=model, **changes)

    for strategy in (Scaffold(), APFL()):
        refused(f"clients of '{strategy.name}' do more than train one model by its own loss", strategy=strategy)
    refused("running_mean` of the model is a statistic of a client's examples", tiny_resnet(3))
    refused(r"Opacus does not know all of the model: `.*` \(LSTM\): ", tiny_char_lstm(3))
    message = r"itself \(FedMoEForSequenceClassification\): a layer that learns and has buffers"
    refused(message, tiny_mixture(), FedMix())
    refused(r"`example_delta` is 0.1 and a client has 12 examples", example_delta=0.1)
    data = tiny_federation()
    few_and_many = FederatedDataset(data.pool, [np.arange(3), np.arange(3, 15)])
    with pytest.raises(ValueError, match=r"`example_delta` is 0.1 and a client has 12 examples"):
        trainer(tmp_path, data=few_and_many, example_delta=0.1)


def test_clients_elsewhere_are_refused_for_now(tmp_path):
    for name in ("example_noise_multiplier", "example_target_epsilon"):
        args = tiny_args(tmp_path, **HIDDEN | {"example_noise_multiplier": None, name: 1.0})
        with pytest.raises(ValueError, match=f"Clients are elsewhere, but `{name}` is 1.0, which is not done there"):
            MessageEngine.refuse(tiny_expert(), args, FedAvg())


def test_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(ImportError, match=r"`pip install hf_fedmoe\[privacy\]`"):
        trainer(tmp_path)
