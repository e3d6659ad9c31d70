"""FedJETs: two rounds by hand, its limit, what travels, what stays frozen, and the result as a checkpoint."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image
from torch.nn.functional import cross_entropy, nll_loss
from transformers import pipeline

from hf_fedmoe.data import FederatedDataset
from hf_fedmoe.models import FedMoEForImageClassification, FedMoEForSequenceClassification
from hf_fedmoe.strategies import FedAvg, FedJETs, freeze_common_expert
from hf_fedmoe.training import FederatedTrainer
from tests.tiny_federation import (
    assert_equal_states,
    state,
    tiny_args,
    tiny_expert,
    tiny_federation,
    tiny_gated_experts,
    tiny_mixture,
    tiny_rows,
)
from tests.tiny_images import (
    IMAGE_SIZE,
    make_statistics_different,
    tiny_cnn,
    tiny_image_federation,
    tiny_processor,
    tiny_resnet,
)
from tests.tiny_models import make_different


def jets(num_routed_experts: int = 3) -> FedMoEForSequenceClassification:
    return freeze_common_expert(make_different(tiny_mixture(num_routed_experts)))


def run(output_dir, model, strategy=None, data=None, **changes):
    trainer = FederatedTrainer(
        model, tiny_args(output_dir, **changes), data or tiny_federation(), strategy=strategy or FedJETs()
    )
    trainer.train()
    return trainer


def num_bytes(*modules) -> int:
    return sum(tensor.numel() * tensor.element_size() for module in modules for tensor in module.state_dict().values())


def step_by_hand(model, client: int, rows) -> list[int]:
    """One step of plain gradient descent at rate 0.1 on all examples, in place; the experts that the client had."""
    inputs = {name: torch.tensor(rows[name]) for name in ("input_ids", "attention_mask")}
    labels_B = torch.tensor(rows["label"])
    with torch.no_grad():
        features_BH = model.main_experts[0].bert(**inputs).pooler_output
    gate_logits_BK = features_BH @ model.gate.weight.T + model.gate.bias
    if client < 3:
        experts = [client]
        loss = cross_entropy(model.routed_experts[client](**inputs).logits, labels_B)
        loss = loss + cross_entropy(gate_logits_BK, torch.full_like(labels_B, client))
    else:
        experts = gate_logits_BK.softmax(-1).sum(0).argsort(descending=True)[:2].tolist()
        Q_BE = gate_logits_BK[:, experts].exp()
        P_BEC = torch.stack([model.routed_experts[k](**inputs).logits.softmax(-1) for k in experts], 1)
        loss = nll_loss(((Q_BE / Q_BE.sum(1, keepdim=True))[:, :, None] * P_BEC).sum(1).log(), labels_B)
    learning = [*model.gate.parameters(), *(p for k in experts for p in model.routed_experts[k].parameters())]
    for parameter, gradient in zip(learning, torch.autograd.grad(loss, learning), strict=True):
        parameter.data -= 0.1 * gradient
    return experts


def mean_by_hand(target, sources, sizes) -> None:
    for name, tensor in target.state_dict().items():
        tensor.copy_(sum(n * source.state_dict()[name] for source, n in zip(sources, sizes, strict=True)) / sum(sizes))


def test_two_rounds_by_hand(tmp_path):
    sizes = [6, 4, 8, 10, 5]
    data = FederatedDataset(tiny_rows(33), np.split(np.arange(33), np.cumsum(sizes)[:-1]))
    model = jets().double()
    server, chosen = copy.deepcopy(model), []
    for _ in range(2):
        clients = [copy.deepcopy(server) for _ in sizes]
        chosen.append([step_by_hand(clients[c], c, data.client(c)) for c in range(5)])
        mean_by_hand(server.gate, [client.gate for client in clients], sizes)
        for k, expert in enumerate(server.routed_experts):
            had = [c for c in range(5) if k in chosen[-1][c]]
            mean_by_hand(expert, [clients[c].routed_experts[k] for c in had], [sizes[c] for c in had])
    trainer = run(
        tmp_path,
        model,
        data=data,
        rounds=2,
        clients_per_round=5,
        per_device_train_batch_size=32,
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=0.0,
    )
    assert_equal_states(state(model), state(server), atol=1e-6, rtol=0)
    assert chosen[0][3:] == [[1, 2], [2, 1]]
    for report, experts in zip(trainer.rounds, chosen, strict=True):
        counts = [sum(k in had for had in experts) for k in range(3)]
        assert [report.metrics[f"expert_{k}_clients"] for k in range(3)] == counts
        # Anchors have one expert, the two others two; everybody has the gate.
        travelled = 7 * num_bytes(model.routed_experts[0]) + 5 * num_bytes(model.gate)
        assert report.bytes_up == report.bytes_down == travelled


def test_one_expert_that_everybody_has_is_fedavg(tmp_path):
    settings = dict(optim="sgd", learning_rate=0.1, clients_per_round=4)
    model = freeze_common_expert(tiny_mixture(1))
    run(tmp_path / "fedjets", model, FedJETs(experts_per_client=1), **settings)
    fedavg = FederatedTrainer(
        tiny_expert(), tiny_args(tmp_path / "fedavg", **settings), tiny_federation(), strategy=FedAvg()
    )
    fedavg.train()
    assert_equal_states(state(model.routed_experts[0]), state(fedavg.model), atol=1e-6, rtol=0)


def test_anchors_take_part_in_every_round(tmp_path):
    data = tiny_federation(num_clients=8)
    drawn = FederatedTrainer(tiny_expert(), tiny_args(tmp_path, rounds=4), data)
    drawn.train()
    trainer = run(tmp_path, jets(), data=data, rounds=4)
    for mine, theirs in zip(trainer.rounds, drawn.rounds, strict=True):
        assert mine.clients == sorted({0, 1, 2, *theirs.clients})
    assert any(len(report.clients) > 3 for report in trainer.rounds)


def test_an_expert_whose_only_client_fails_keeps_its_value(tmp_path):
    class Failing(FedJETs):
        def train_client(self, local, task):
            done = super().train_client(local, task)
            if task.client == 1:
                raise OSError("battery empty")
            return done

    model = jets()
    before = state(model)
    trainer = run(tmp_path, model, Failing(), tiny_federation(num_clients=3), rounds=1)
    report, after = trainer.rounds[0], state(model)
    assert report.refused.keys() == {1} and report.metrics["expert_1_clients"] == 0
    for name, tensor in before.items():
        trained = name.startswith(("gate.", "routed_experts.0.", "routed_experts.2."))
        assert trained or torch.equal(after[name], tensor), name
    assert not torch.equal(after["routed_experts.0.classifier.weight"], before["routed_experts.0.classifier.weight"])
    each = num_bytes(model.routed_experts[0], model.gate)
    assert (report.bytes_down, report.bytes_up) == (3 * each, 2 * each)


@pytest.mark.parametrize("had", [-1.0, 0.5, 1e30])
def test_a_client_has_an_expert_or_has_not(had, tmp_path):
    class Liar(FedJETs):
        """Client 3 would weigh so much of expert 0."""

        def train_client(self, local, task):
            payload, kept = super().train_client(local, task)
            if task.client == 3:
                payload.metrics["expert_0"] = had
            return payload, kept

    lied = run(tmp_path, jets(), Liar(), rounds=1, clients_per_round=4)
    assert lied.rounds[0].refused == {
        3: f"it reports expert_0 = {had}, where 1 is due for an expert that it had and 0 for others"
    }


def test_statistics_of_a_frozen_image_expert_do_not_move(tmp_path):
    torch.manual_seed(5)
    common = make_statistics_different(tiny_resnet())
    model = freeze_common_expert(FedMoEForImageClassification.from_expert(common, num_routed_experts=3))
    # Four clients of twelve images, three steps each; those of the anchors' experts add up.
    trainer = FederatedTrainer(
        model, tiny_args(tmp_path), tiny_image_federation(), strategy=FedJETs(), processing_class=tiny_processor()
    )
    trainer.train()
    assert_equal_states(state(model.main_experts[0]), state(common))
    for expert in model.routed_experts:
        found = state(expert)
        assert {found[name].item() for name in found if "num_batches_tracked" in name} == {9}
        assert not any(torch.equal(found[n], state(common)[n]) for n in found if "running" in n)
    expert, gate = num_bytes(model.routed_experts[0]), num_bytes(model.gate)
    for report in trainer.rounds:
        ordinary = len(report.clients) - 3
        assert report.bytes_up == report.bytes_down == (3 + 2 * ordinary) * expert + len(report.clients) * gate
    # What the gate reads at a client is what it reads in the end: no statistics of the client's batches.
    federation = trainer._federation_of_the_last_round()
    task = federation.participants.task(0, 0, torch.zeros(federation.server.layout.size))
    features_NH, _ = trainer.strategy.consult_gate(federation.local_trainer, task)
    images = trainer.data_collator([task.dataset[row] for row in range(12)])["pixel_values"]
    with torch.no_grad():
        torch.testing.assert_close(features_NH, model.eval().gate_features({"pixel_values": images}))


@pytest.mark.parametrize(
    ("make", "strategy", "message"),
    [
        (tiny_expert, FedJETs(), "`model` is a BertForSequenceClassification"),
        (tiny_gated_experts, FedJETs(), "gate='model', num_main_experts=0 and no `peft_config`"),
        (lambda: tiny_mixture(peft_config=LoraConfig(r=2)), FedJETs(), "and a `peft_config`"),
        (tiny_mixture, FedJETs(), "they are trainable and alpha is 0.500"),
        (lambda: jets(1), FedJETs(), "`experts_per_client` is 2, but the mixture has 1"),
    ],
)
def test_other_models_are_refused(tmp_path, make, strategy, message):
    with pytest.raises(ValueError, match=message):
        FederatedTrainer(make(), tiny_args(tmp_path), tiny_federation(), strategy=strategy)


def test_what_has_no_common_expert_cannot_be_frozen():
    with pytest.raises(ValueError, match="and a `peft_config`: build it with"):
        freeze_common_expert(tiny_mixture(peft_config=LoraConfig(r=2)))


def test_settings_are_checked(tmp_path):
    with pytest.raises(ValueError, match="`experts_per_client` is 0: give at least 1"):
        FedJETs(experts_per_client=0)
    with pytest.raises(ValueError, match="There are 2 clients for `num_routed_experts` = 3"):
        run(tmp_path, jets(), data=tiny_federation(num_clients=2))
    with pytest.raises(ValueError, match="`upload_compression` is 'top_k'"):
        run(tmp_path, jets(), upload_compression="top_k")


def test_the_saved_model_sends_each_image_to_its_best_expert(tmp_path):
    torch.manual_seed(5)
    model = freeze_common_expert(FedMoEForImageClassification.from_expert(tiny_cnn(), num_routed_experts=2))
    args = tiny_args(tmp_path, rounds=10, num_train_epochs=4, clients_per_round=4)
    trainer = FederatedTrainer(
        model, args, tiny_image_federation(), strategy=FedJETs(), processing_class=tiny_processor()
    )
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] > 0.6
    trainer.save_model(str(tmp_path / "model"))
    trainer.create_model_card(folder=tmp_path / "model")
    loaded = FedMoEForImageClassification.from_pretrained(tmp_path / "model")
    assert_equal_states(state(loaded), state(model))
    with pytest.raises(ValueError, match=r"they are trainable and alpha is 1\.000: call `freeze_common_expert"):
        FedJETs().server_models(loaded)
    FedJETs().server_models(freeze_common_expert(loaded))
    image = Image.fromarray(np.full((IMAGE_SIZE, IMAGE_SIZE, 3), 90, np.uint8))
    pixels = tiny_processor()(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        best = model.gate(model.gate_features({"pixel_values": pixels})).argmax().item()
        wanted = model.routed_experts[best](pixels).logits.softmax(-1).max().item()
    classify = pipeline("image-classification", model=str(tmp_path / "model"))
    assert classify(image)[0]["score"] == pytest.approx(wanted, abs=1e-6)
