"""The accounting of private runs: epsilon, the noise for it, the stop, resuming, and what is told."""

import json
import math
import sys
from pathlib import Path

import dp_accounting as dp
import pytest
import torch
from peft import LoraConfig

from hf_fedmoe.federation import Federation
from hf_fedmoe.strategies import FedAvg, FedMoE, Scaffold
from hf_fedmoe.training import FederatedTrainer
from hf_fedmoe.training.privacy_budget import SPENT, SPENT_FILE, PrivacyBudget
from tests.tiny_federation import (
    assert_equal_states,
    interrupted_and_resumed,
    state,
    timeless,
    tiny_args,
    tiny_expert,
    tiny_federation,
    tiny_mixture,
)
from tests.tiny_images import tiny_resnet


PRIVATE = {"noise_multiplier": 1.0, "clipping_norm": 0.5, "delta": 1e-2, "noise_source": "seed"}
POISSON = PRIVATE | {"client_choice": "poisson"}


def budget(folder, num_clients=1000, **changes):
    settings = POISSON | {"delta": 1e-4, "clients_per_round": 50, "rounds": 20}
    return PrivacyBudget(tiny_args(folder, **settings | changes), num_clients)


def trainer(folder, strategy=None, data=None, **changes):
    return FederatedTrainer(tiny_expert(), tiny_args(folder, **POISSON | changes), data or tiny_federation(), strategy)


# Epsilon


def test_epsilon_is_that_of_dp_accounting(tmp_path):
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    relations = dp.NeighboringRelation
    drawn = dp.PoissonSampledDpEvent(0.05, dp.GaussianDpEvent(1.0))
    # The sum moves by two norms where one client is exchanged, so that its noise is half in units of that.
    chosen = dp.SampledWithoutReplacementDpEvent(1000, 50, dp.GaussianDpEvent(0.5))
    for changes, accountant, event in (
        ({}, RdpAccountant(neighboring_relation=relations.ADD_OR_REMOVE_ONE), drawn),
        ({"privacy_accountant": "pld"}, PLDAccountant(relations.ADD_OR_REMOVE_ONE), drawn),
        ({"client_choice": "uniform"}, RdpAccountant(neighboring_relation=relations.REPLACE_ONE), chosen),
    ):
        found = budget(tmp_path, **changes).epsilon(20)
        assert found == accountant.compose(event, 20).get_epsilon(1e-4) and 0.5 < found < 30


def test_epsilon_is_that_of_flower_where_all_are_counted_alike(tmp_path):
    flower = pytest.importorskip("flwr.supercore.privacy_accounting")
    backend = pytest.importorskip("flwr.supercore.privacy_accounting.rdp_accountant")
    config = flower.PrivacyConfig(
        1e-4, 1000, flower.NeighboringRelation.ADD_OR_REMOVE_ONE, flower.SamplingMethod.POISSON
    )
    accountant = backend.RdpAccountant(config)
    accountant.compose(flower.GaussianPrivacyEvent(1.0, 50, 1000), 20)
    assert budget(tmp_path).epsilon(20) == accountant.get_epsilon(1e-4)


def test_everybody_in_every_round_is_a_gaussian_mechanism(tmp_path):
    # T releases of noise z are one of noise z / sqrt(T), of which epsilon is known (Balle and Wang 2018).
    found = budget(tmp_path, num_clients=50, rounds=4, noise_multiplier=8.0, privacy_accountant="pld").epsilon(4)

    def phi(x):
        return math.erfc(-x / math.sqrt(2)) / 2

    delta = phi(0.125 - 4 * found) - math.exp(found) * phi(-0.125 - 4 * found)
    assert delta == pytest.approx(1e-4, rel=0.02)


@pytest.mark.parametrize("accountant", ["rdp", "pld"])
def test_the_noise_is_the_least_for_the_target(accountant, tmp_path):
    kind = {"privacy_accountant": accountant}
    z = budget(tmp_path, noise_multiplier=None, target_epsilon=2.0, **kind).find_noise()
    assert budget(tmp_path, noise_multiplier=z, **kind).epsilon(20) <= 2.0
    assert budget(tmp_path, noise_multiplier=z - 0.01, **kind).epsilon(20) > 2.0


@pytest.mark.parametrize("accountant", ["rdp", "pld"])
def test_the_least_noise_where_the_target_is_far_away(accountant, tmp_path):
    far = {"target_epsilon": 1e5, "privacy_accountant": accountant}
    assert budget(tmp_path, noise_multiplier=None, **far).find_noise() == 0.05


def test_no_question_is_computed_twice(tmp_path, monkeypatch):
    from dp_accounting.pld import privacy_loss_distribution as losses

    calls = []

    def count(owner, name):
        computed = getattr(owner, name)

        def counted(*args, **kwargs):
            calls.append((name, args[-1]))
            return computed(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    count(losses, "from_gaussian_mechanism")
    count(losses.PrivacyLossDistribution, "self_compose")
    run = trainer(tmp_path, rounds=2, privacy_accountant="pld", noise_source="system", target_epsilon=100.0)
    run.train()
    run.create_model_card()
    run.train()  # counts on
    composed = [("self_compose", releases) for releases in (1, 2, 3, 4)]
    assert calls == [("from_gaussian_mechanism", 1.0), *composed]
    found = [entry["epsilon"] for entry in run.state.log_history if "epsilon" in entry]
    monkeypatch.undo()
    drawn = dp.PoissonSampledDpEvent(run.args.clients_per_round / 4, dp.GaussianDpEvent(1.0))
    assert found[-1] == dp.pld.PLDAccountant().compose(drawn, 4).get_epsilon(1e-2)


@pytest.mark.parametrize("accountant", ["rdp", "pld"])
def test_an_answer_is_of_the_arguments_as_they_are(accountant, tmp_path):
    for name, value in (("delta", 1e-6), ("clients_per_round", 100)):
        asked = budget(tmp_path, privacy_accountant=accountant)
        before = asked.epsilon(20)
        setattr(asked.args, name, value)
        anew = budget(tmp_path, privacy_accountant=accountant, **{name: value})
        assert before < asked.epsilon(20) == anew.epsilon(20)


def test_without_noise_there_is_no_epsilon(tmp_path):
    found = budget(tmp_path, noise_multiplier=0.0, delta=None)
    assert found.epsilon(1) == math.inf and found.spent() == {} and found.facts() is None


def test_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ImportError, match=r"`pip install hf_fedmoe\[privacy\]`"):
        trainer(tmp_path)


# A run


def test_a_run_tells_its_epsilon_and_nothing_of_its_clients(tmp_path):
    run = trainer(tmp_path, save_strategy="steps", clipping_quantile=0.5, noise_multiplier=0.1, clients_per_round=3)
    run.train()
    *rounds, last = run.state.log_history
    names = {"epsilon", "clipping_norm", "seconds_server", "epoch", "step"}
    assert all(entry.keys() == names for entry in rounds) and len(rounds) == 3
    assert last.keys() == {"train_runtime", "train_steps_per_second", "total_flos", "epoch", "step"}
    expected = [PrivacyBudget(run.args, 4).epsilon(n) for n in (1, 2, 3)]
    assert [entry["epsilon"] for entry in rounds] == expected and expected[0] < expected[2]
    saved = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert [entry["epsilon"] for entry in saved["log_history"] if "epsilon" in entry] == expected
    run.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "no bound on that (epsilon) can be given" in card  # whoever has the checkpoint has the seed
    assert "took part" not in card and "Clients to server" not in card


def test_the_card_says_what_holds(tmp_path):
    run = trainer(tmp_path, noise_source="system", rounds=2)
    run.train()
    run.create_model_card()
    card = (tmp_path / "README.md").read_text()
    epsilon = run.state.log_history[1]["epsilon"]
    assert f"({epsilon:.3g}, 0.01)-differentially private for adding or leaving out one client" in card
    assert "not against the server" in card and "can be given" not in card
    assert "| Examples of a client | not told |" in card


def test_noise_of_the_system_is_another_each_time(tmp_path):
    runs = [trainer(tmp_path / str(n), noise_source="system", client_choice="uniform", rounds=1) for n in range(2)]
    for run in runs:
        run.train()
    first, second = (state(run.model)["classifier.weight"] for run in runs)
    assert not torch.allclose(first, second, atol=1e-3)


def test_rounds_of_nobody_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(Federation, "draw", lambda *args: [])
    run = trainer(tmp_path, rounds=2)
    before = state(run.model)
    run.train()
    assert run.state.global_step == 2 and [report.clients for report in run.rounds] == [[], []]
    moved = state(run.model)["classifier.weight"] - before["classifier.weight"]
    assert moved.std().item() == pytest.approx(math.sqrt(2) * 0.5 / 2, rel=0.5)
    assert run.state.log_history[1]["epsilon"] == PrivacyBudget(run.args, 4).epsilon(2)


# The stop


def test_a_run_stops_before_the_budget_is_overspent(tmp_path):
    enough = budget(tmp_path, 4, clients_per_round=2, delta=1e-2).epsilon(2)

    def make(rounds):
        return trainer(tmp_path, rounds=rounds, target_epsilon=enough + 0.01, save_strategy="steps")

    run = make(4)
    run.train()
    assert run.state.global_step == 2 == len(run.rounds)
    resumed = make(8)
    resumed.train(resume_from_checkpoint=True)  # of more rounds none fits
    assert resumed.rounds == [] and resumed.state.global_step == 2
    assert_equal_states(state(resumed.model), state(run.model))


def test_a_resumed_run_counts_on(tmp_path):
    whole = trainer(tmp_path / "whole", save_strategy="steps", clipping_quantile=0.5, noise_multiplier=0.1)
    whole.train()

    def make():
        changes = {"save_strategy": "steps", "clipping_quantile": 0.5, "noise_multiplier": 0.1}
        return trainer(tmp_path / "parts", **changes)

    resumed = interrupted_and_resumed(make)
    assert_equal_states(state(resumed.model), state(whole.model))
    assert timeless(resumed.state.log_history)[:3] == timeless(whole.state.log_history)[:3]


def test_a_release_that_no_checkpoint_knows_is_counted(tmp_path):
    run = trainer(tmp_path, save_strategy="steps", noise_source="system")
    run.train()
    assert json.loads((tmp_path / SPENT_FILE).read_text()) == {"noise_multiplier": 1.0, "releases": 3}
    again = trainer(tmp_path, save_strategy="steps", noise_source="system")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))  # as if round 3 had been broken off
    assert again._left[0][SPENT].tolist() == [1.0, 4.0]
    assert again.state.log_history[-2]["epsilon"] == PrivacyBudget(run.args, 4).epsilon(4)


def test_training_once_more_counts_on(tmp_path):
    run = trainer(tmp_path, rounds=2)
    run.train()
    run.train()
    assert run._left[0][SPENT].tolist() == [1.0, 4.0]


def test_noise_that_was_found_stays_when_rounds_are_added(tmp_path):
    changes = {"noise_multiplier": None, "target_epsilon": 6.0, "save_strategy": "steps"}
    first = trainer(tmp_path, rounds=1, **changes)
    first.train()
    z, _ = first._left[0][SPENT].tolist()
    more = trainer(tmp_path, rounds=3, **changes)
    more.train(resume_from_checkpoint=True)
    assert more._left[0][SPENT].tolist() == [z, 1.0] and more.state.global_step == 1


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise_multiplier": None}, "`delta` is 0.01, which makes no run private by itself"),
        ({"noise_multiplier": None, "delta": None, "clipping_norm": None}, "'poisson', which may draw nobody"),
        ({"client_choice": "stratified"}, "'stratified', a draw of which no accounting"),
        ({"noise_multiplier": -1.0}, "`noise_multiplier` is -1.0"),
        ({"target_epsilon": 0.0}, "`target_epsilon` is 0.0"),
        ({"clipping_norm": None}, "`clipping_norm` is None"),
        ({"clipping_norm": math.inf}, "`clipping_norm` is inf"),
        ({"noise_multiplier": 0.0, "target_epsilon": 2.0}, "without noise there is no epsilon"),
        ({"delta": None}, "`delta` is None"),
        ({"delta": 1.5}, "`delta` is 1.5"),
        ({"privacy_accountant": "moments"}, "`privacy_accountant` is 'moments'"),
        ({"privacy_accountant": "pld", "client_choice": "uniform"}, 'for which there is "rdp" only'),
        ({"noise_source": "dice"}, "`noise_source` is 'dice'"),
        ({"clipping_quantile": 1.0}, "`clipping_quantile` is 1.0"),
        ({"clipping_quantile": 0.5}, "The noise multiplier is 1, and with .* must be below 0.2"),
        ({"robust_fusion": "multi_krum"}, "`robust_fusion` is 'multi_krum' in a private run"),
        ({"max_update_norm_ratio": 2.0}, "`max_update_norm_ratio` is 2.0 in a private run"),
    ],
)
def test_arguments_that_contradict_one_another(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tiny_args(tmp_path, **POISSON | changes)


def test_methods_models_and_clients_that_cannot_be_private(tmp_path):
    def refused(message, model=None, strategy=None, peft_config=None, **changes):
        args = tiny_args(tmp_path, **POISSON | changes)
        with pytest.raises(ValueError, match=message):
            FederatedTrainer(model or tiny_expert(), args, tiny_federation(), strategy, peft_config=peft_config)

    refused(r"'fedmoe' cannot be made private: .*in the clear \(`probe`\)", tiny_mixture(), FedMoE())
    refused(r"'scaffold' cannot be made private: .*\(`upload_tensors`\)", None, Scaffold())
    refused("running_mean` of the model is a statistic of a client's examples", tiny_resnet())
    refused("give less than 0.25", delta=0.3)
    refused("`client_parallelism` is 'sums', where uploads are added", client_parallelism="sums")
    refused("`lora_fusion` is 'svd', and products of adapters are no sum", peft_config=LoraConfig(r=2))


def test_adapters_are_noised_where_they_are_linear(tmp_path, caplog):
    def run(fusion):
        args = tiny_args(tmp_path / fusion, **POISSON | {"lora_fusion": fusion, "rounds": 1})
        made = FederatedTrainer(tiny_expert(), args, tiny_federation(), FedAvg(), peft_config=LoraConfig(r=2))
        before = state(made.model)
        made.train()
        return {name for name, tensor in state(made.model).items() if not torch.equal(tensor, before[name])}

    moved = run("ffa")
    assert any("lora_B" in name for name in moved) and not any("lora_A" in name for name in moved)
    assert any("lora_A" in name for name in run("factors"))


def test_the_file_is_not_for_the_hub():
    assert Path(SPENT_FILE).name.startswith("_")
