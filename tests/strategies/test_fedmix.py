"""FedMix: one round by hand, its limit, what experts need to become different, and the result as a checkpoint."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from hf_fedmoe.data import FederatedDataset
from hf_fedmoe.models import (
    EnsembleForImageClassification,
    FedMoEForImageClassification,
    FedMoEForSequenceClassification,
)
from hf_fedmoe.strategies import FedAvg, FedMix
from hf_fedmoe.training import FederatedTrainer
from tests.tiny_federation import (
    assert_equal_states,
    state,
    tiny_args,
    tiny_expert,
    tiny_federation,
    tiny_gate,
    tiny_gated_experts,
    tiny_mixture,
    tiny_rows,
)
from tests.tiny_images import IMAGE_SIZE, tiny_cnn, tiny_image_federation, tiny_processor


ONE_STEP = dict(rounds=1, per_device_train_batch_size=32, optim="sgd", learning_rate=0.1, max_grad_norm=0.0)


def run(output_dir, model, data=None, **changes):
    trainer = FederatedTrainer(model, tiny_args(output_dir, **changes), data or tiny_federation(), strategy=FedMix())
    trainer.train()
    return trainer


def test_a_round_by_hand(tmp_path):
    data = FederatedDataset(tiny_rows(20), [np.arange(14), np.arange(14, 20)])
    model = tiny_gated_experts(entropy_weight=0.3, balance_weight=0.2).double()
    sent = [name for name in state(model) if name != "alpha_logit"]
    wanted = {name: torch.zeros_like(model.get_parameter(name)) for name in sent}
    for rows, weight in ((data.client(0), 0.7), (data.client(1), 0.3)):
        client = tiny_gated_experts().double()
        inputs = {name: torch.tensor(rows[name]) for name in ("input_ids", "attention_mask")}
        Q_BK = client.gate(**inputs).logits.softmax(-1)
        P_BKC = torch.stack([expert(**inputs).logits.softmax(-1) for expert in client.routed_experts], 1)
        P_BC = (Q_BK[:, :, None] * P_BKC).sum(1)
        loss = -P_BC[range(len(P_BC)), rows["label"]].log().mean()
        loss = loss - 0.3 * (Q_BK * Q_BK.log()).sum(-1).mean()
        mean_K = Q_BK.mean(0)
        loss = loss + 0.2 * (mean_K * (2 * mean_K).log()).sum()
        gradients = torch.autograd.grad(loss, [client.get_parameter(name) for name in sent])
        for name, gradient in zip(sent, gradients, strict=True):
            wanted[name] += weight * (client.get_parameter(name).detach() - 0.1 * gradient)
    trainer = run(tmp_path, model, data, **ONE_STEP)
    trained = state(model)
    # The shares of examples, 0.7 and 0.3, are float32.
    assert_equal_states({name: trained[name] for name in sent}, wanted, atol=1e-7, rtol=0)
    sizes = sum(p.numel() for p in model.parameters())
    assert trainer.rounds[0].bytes_up == trainer.rounds[0].bytes_down == 2 * 8 * sizes


def test_one_expert_is_fedavg(tmp_path):
    settings = dict(optim="sgd", learning_rate=0.1)
    model = run(tmp_path / "fedmix", tiny_gated_experts(1), **settings).model
    fedavg = FederatedTrainer(
        tiny_expert(), tiny_args(tmp_path / "fedavg", **settings), tiny_federation(), strategy=FedAvg()
    )
    fedavg.train()
    assert_equal_states(state(model.routed_experts[0]), state(fedavg.model), atol=1e-6, rtol=0)


def disagreement(model) -> float:
    """Returns how much of their probability the two routed experts give to other classes."""
    rows = tiny_rows(100, seed=1)
    with torch.no_grad():
        logits_BSC = model(input_ids=torch.tensor(rows["input_ids"]), output_expert_logits=True).expert_logits
    P_BKC = logits_BSC[:, -2:].softmax(-1)
    return (P_BKC[:, 0] - P_BKC[:, 1]).abs().sum(-1).mean().item() / 2


def test_experts_of_one_start_stay_alike_and_those_with_heads_of_their_own_do_not(tmp_path):
    settings = dict(rounds=3, num_train_epochs=2, learning_rate=3e-3)
    data = tiny_federation(client_size=40)
    alike = FedMoEForSequenceClassification.from_expert(tiny_expert(), tiny_gate(2), 2, num_main_experts=0)
    apart = [disagreement(run(tmp_path, model, data, **settings).model) for model in (alike, tiny_gated_experts())]
    assert apart[0] < 0.01 and apart[1] > 0.1


def test_with_a_main_expert_alpha_is_learned_too(tmp_path):
    model = tiny_mixture()
    before = state(model)
    run(tmp_path, model)
    assert all(not torch.equal(after, before[name]) for name, after in state(model).items() if "key.bias" not in name)
    assert model.alpha.item() != 0.5


def test_a_classifier_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`model` is a BertForSequenceClassification: build one"):
        FederatedTrainer(tiny_expert(), tiny_args(tmp_path), tiny_federation(), strategy=FedMix())


def test_images_and_the_saved_mixture(tmp_path):
    torch.manual_seed(5)
    experts = list(EnsembleForImageClassification.from_classifier(tiny_cnn(), 2).models)
    fields = dict(top_l=2, top_l_weighting="renormalize")
    model = FedMoEForImageClassification.from_experts([], experts, tiny_cnn(2), **fields)
    args = tiny_args(tmp_path, rounds=10, num_train_epochs=4, clients_per_round=4)
    trainer = FederatedTrainer(
        model, args, tiny_image_federation(), strategy=FedMix(), processing_class=tiny_processor()
    )
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] > 0.6
    trainer.save_model(str(tmp_path / "model"))
    trainer.create_model_card(folder=tmp_path / "model")
    loaded = FedMoEForImageClassification.from_pretrained(tmp_path / "model")
    assert_equal_states(state(loaded), state(model))
    classify = pipeline("image-classification", model=str(tmp_path / "model"))
    image = Image.fromarray(np.full((IMAGE_SIZE, IMAGE_SIZE, 3), 90, np.uint8))
    pixels = tiny_processor()(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        wanted = model(pixels, dense=True).logits.softmax(-1).max().item()
    assert classify(image)[0]["score"] == pytest.approx(wanted, abs=1e-6)
