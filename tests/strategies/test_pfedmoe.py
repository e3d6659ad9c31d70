"""pFedMoE: one step by hand, its limits, whole runs."""

import dataclasses
import json

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import BertConfig

from hf_fedmoe.data import FederatedDataset, ImageCollator, hold_out_client_tests
from hf_fedmoe.models import SmallCNNForImageClassification
from hf_fedmoe.strategies import FedAvg, Local, PFedMoE, pfedmoe_cnns
from hf_fedmoe.training import FederatedTrainer
from tests.tiny_federation import (
    assert_equal_states,
    state,
    tiny_args,
    tiny_expert,
    tiny_federation,
    tiny_pfedmoe,
)
from tests.tiny_images import tiny_cnn, tiny_image_federation, tiny_processor
from tests.tiny_models import tiny_bert


PLAIN = {"max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 0.1}


def trained(output_dir, model, strategy, data, **changes):
    images = {"processing_class": tiny_processor()} if model.main_input_name == "pixel_values" else {}
    trainer = FederatedTrainer(model, tiny_args(output_dir, **changes), data, strategy=strategy, **images)
    trainer.train()
    return trainer


def fixed_cnn(**config):
    torch.manual_seed(3)
    return tiny_cnn(**config)


def kept(trainer, client):
    return trainer._federation_of_the_last_round().store.get(client)


def part(tensors, name):
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def force(strategy, expert):
    """The gate gives all weight to one expert, 0 the shared and 1 the own, and cannot learn otherwise."""
    make_pair = strategy.make_pair

    def forced(model, index, seed):
        pair = make_pair(model, index, seed)
        with torch.no_grad():
            pair.gate[5].weight.zero_()
            pair.gate[5].bias.fill_(-1000.0)[expert] = 1000.0
        return pair

    strategy.make_pair = forced
    return strategy


def test_the_five_client_models_have_the_published_sizes():
    with torch.device("meta"):
        sizes = [SmallCNNForImageClassification(config).num_parameters() for config in pfedmoe_cnns()]
    assert sizes == [2_621_558, 1_815_142, 1_320_558, 1_060_358, 670_058]
    small = pfedmoe_cnns(26, image_size=28, num_channels=1)[4]
    assert (small.num_labels, small.image_size, small.num_channels, small.hidden_size) == (26, 28, 1, (500, 500))


def test_a_step_of_two_clients_by_hand(tmp_path):
    data = tiny_image_federation(num_clients=2)
    data = FederatedDataset(data.pool, [data.client_indices[0], data.client_indices[1][:6]])
    server = fixed_cnn()
    own = [tiny_cnn(hidden_size=9).config, tiny_cnn(channels=(5, 4)).config]
    strategy = PFedMoE(own, gate_hidden_size=4, shared_rate=0.5, gate_rate=2.0)
    start = state(server)
    trainer = trained(
        tmp_path, server, strategy, data, rounds=1, num_train_epochs=1, per_device_train_batch_size=12, **PLAIN
    )
    body = [name for name in start if not name.startswith("classifier.")]
    of_clients = []
    for client in range(2):
        pair = strategy.make_pair(fixed_cnn(), client, seed=11).train()
        pair.shared.load_state_dict({name: start[name] for name in body})
        batch = ImageCollator(tiny_processor())(list(data.client(client)))
        images = batch["pixel_values"]
        norm, first, norm_1, _, second, norm_2, _ = pair.gate
        scores_B2 = norm_2(second(norm_1(first(norm(images.flatten(1)))).sigmoid()))
        a_G, a_F = scores_B2.softmax(-1).T[:, :, None]
        G_BH = pair.projection(pair.shared.small_cnn(images).pooler_output)
        logits_BC = pair.header(a_G * G_BH + a_F * pair.own.small_cnn(images).pooler_output)
        nn.functional.cross_entropy(logits_BC, batch["labels"]).backward()
        rates = {"shared": 0.05, "gate": 0.2}
        with torch.no_grad():
            for name, parameter in pair.named_parameters():
                parameter -= rates.get(name.split(".")[0], 0.1) * parameter.grad
        wanted = {name: tensor for name, tensor in state(pair).items() if "num_batches" not in name}
        found = kept(trainer, client)
        for name in wanted.keys() & found.keys():
            torch.testing.assert_close(found[name], wanted[name], atol=1e-5, rtol=1e-4, msg=name)
        assert wanted.keys() - found.keys() == {f"shared.{name}" for name in body}
        of_clients.append(part(wanted, "shared"))
    for name, tensor in state(trainer.model).items():
        mean = start[name] if name not in body else (12 * of_clients[0][name] + 6 * of_clients[1][name]) / 18
        torch.testing.assert_close(tensor, mean, atol=1e-5, rtol=1e-4, msg=name)
        assert torch.equal(tensor, start[name]) == (name not in body)


def test_with_the_gate_at_the_own_extractor_it_is_local_training(tmp_path):
    data, settings = tiny_federation(num_clients=2), {"max_grad_norm": 0.0, "num_train_epochs": 2}
    own = tiny_bert(3, hidden_size=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    strategy = force(PFedMoE([own.config]), expert=1)
    pair = strategy.make_pair(tiny_expert(), 0, 11)
    own.load_state_dict(part(state(pair), "own") | {f"classifier.{n}": t for n, t in state(pair.header).items()})
    mine = trained(tmp_path / "pfedmoe", tiny_expert(), strategy, data, **settings)
    local = trained(tmp_path / "local", own, Local(), data, **settings)
    layout = local._federation_of_the_last_round().server.layout
    for client in range(2):
        wanted = layout.views(kept(local, client)["row_P"])
        head = {f"classifier.{name}": tensor for name, tensor in part(kept(mine, client), "header").items()}
        assert_equal_states(wanted, {name: (part(kept(mine, client), "own") | head)[name] for name in wanted})
        assert not torch.equal(wanted["classifier.weight"], pair.header.weight)
    assert_equal_states(state(mine.model), state(tiny_expert()), atol=1e-7, rtol=0)  # the mean of equal rows


def test_with_the_gate_at_the_shared_extractor_one_client_trains_it_as_usual(tmp_path):
    data, settings = tiny_federation(num_clients=1), {"max_grad_norm": 0.0, "clients_per_round": 1}
    strategy = force(PFedMoE([tiny_expert().config]), expert=0)
    pair, whole = strategy.make_pair(tiny_expert(), 0, 11), tiny_expert()
    whole.classifier.load_state_dict(pair.header.state_dict())
    mine = trained(tmp_path / "pfedmoe", tiny_expert(), strategy, data, **settings)
    usual = trained(tmp_path / "fedavg", whole, FedAvg(), data, **settings)
    assert_equal_states(state(mine.model.bert), state(usual.model.bert))
    assert_equal_states(part(kept(mine, 0), "header"), state(usual.model.classifier))
    own = state(pair.own)
    assert_equal_states(part(kept(mine, 0), "own"), own)


def test_a_last_batch_of_one_example(tmp_path):
    trainer = trained(tmp_path, tiny_expert(), tiny_pfedmoe(), tiny_federation(client_size=5))
    assert not any(report.refused for report in trainer.rounds)


def test_clients_have_their_own_architectures_and_start_with_the_bits_of_the_seed(tmp_path):
    data = hold_out_client_tests(tiny_federation(num_clients=5))
    trainer = trained(tmp_path, tiny_expert(), tiny_pfedmoe(), data, clients_per_round=5, rounds=1)
    federation = trainer._federation_of_the_last_round()
    kinds = [type(federation.personal_model(client).own).__name__ for client in range(5)]
    assert kinds == ["BertForSequenceClassification", "GPT2ForSequenceClassification"] * 2 + [kinds[0]]
    strategy = tiny_pfedmoe()
    first, again, other = (state(strategy.make_pair(tiny_expert(), 0, seed)) for seed in (1, 1, 2))
    assert_equal_states(first, again)
    assert not torch.equal(first["header.weight"], other["header.weight"])


def test_settings_are_part_of_a_checkpoint(tmp_path):
    settings = dataclasses.asdict(tiny_pfedmoe())
    assert json.loads(json.dumps(settings)) == settings
    assert PFedMoE(**settings).client_models == tiny_pfedmoe().client_models
    trained(tmp_path, tiny_expert(), tiny_pfedmoe(), tiny_federation(), save_strategy="steps", rounds=1)
    other = PFedMoE([tiny_bert(3).config], gate_hidden_size=5)
    trainer = FederatedTrainer(tiny_expert(), tiny_args(tmp_path, rounds=2), tiny_federation(), strategy=other)
    with pytest.raises(ValueError, match="was written with strategy_settings"):
        trainer.train(resume_from_checkpoint=True)


def test_what_cannot_be_trained(tmp_path):
    with pytest.raises(ValueError, match="`client_models` is empty"):
        PFedMoE([])
    with pytest.raises(ValueError, match="`gate_rate` is -1"):
        PFedMoE([BertConfig()], gate_rate=-1)
    with pytest.raises(ValueError, match=r"`own_config` has 4 labels \(`num_labels`\), `shared_config` 3"):
        trained(tmp_path, tiny_expert(), PFedMoE([tiny_bert(4).config]), tiny_federation())
    with pytest.raises(ValueError, match="`own_config` is a SmallCNNConfig, which AutoModelForSequence"):
        trained(tmp_path, tiny_expert(), PFedMoE([tiny_cnn(3).config]), tiny_federation())
    frozen = tiny_expert()
    frozen.bert.embeddings.requires_grad_(False)
    with pytest.raises(ValueError, match="a BertForSequenceClassification that has none or is frozen in parts"):
        trained(tmp_path, frozen, tiny_pfedmoe(), tiny_federation())
    with pytest.raises(ValueError, match="give a whole classifier, without adapters"):
        FederatedTrainer(
            tiny_expert(), tiny_args(tmp_path), tiny_federation(), strategy=tiny_pfedmoe(), peft_config=LoraConfig(r=2)
        )
