import pytest
import torch
from peft import LoraConfig

from hf_fedmoe.data import hold_out_client_tests
from hf_fedmoe.strategies import FedAvg, FedRolex, HeteroFL, ServerStep, Uploads
from hf_fedmoe.training import FederatedTrainer
from hf_fedmoe.weights import StateLayout, narrow_layout
from tests.tiny_federation import assert_equal_states, state, tiny_args, tiny_expert, tiny_federation
from tests.tiny_images import tiny_cnn, tiny_image_federation, tiny_processor, tiny_resnet
from tests.tiny_models import tiny_gpt2


def run(output_dir, strategy, model=None, data=None, **changes):
    if model is None:
        torch.manual_seed(3)
        model = tiny_cnn(channels=(4, 6), hidden_size=8)
    data = data or hold_out_client_tests(tiny_image_federation(), test_share=0.25)
    args = tiny_args(output_dir, **{"clients_per_round": 4, **changes})
    trainer = FederatedTrainer(model, args, data, strategy=strategy, processing_class=tiny_processor())
    trainer.train()
    return trainer


def resnet():
    torch.manual_seed(5)
    return tiny_resnet()


def test_normalisation_layers_of_clients_of_full_capacity_are_those_of_fedavg(tmp_path):
    # SGD: where a gradient is nearly zero, Adam blows the rounding of a reordered sum up to a whole step.
    settings = dict(optim="sgd", learning_rate=0.1, clients_per_round=3)
    states = [state(run(tmp_path, strategy, resnet(), **settings).model) for strategy in (FedRolex((1.0,)), FedAvg())]
    assert_equal_states(*states, atol=1e-6, rtol=1e-5)


def changed_channels(before, after, name):
    return (before[name] != after[name]).nonzero()[:, 0].unique().tolist()


@pytest.mark.parametrize(
    ("method", "rounds", "channels"),
    [
        (FedRolex, 1, [0, 1, 2]),
        (FedRolex, 2, [0, 1, 2, 3]),
        (FedRolex, 5, [0, 1, 2, 3, 4, 5]),
        (HeteroFL, 3, [0, 1, 2]),
    ],
)
def test_the_window_rolls_and_the_rest_keeps_its_bits(tmp_path, method, rounds, channels):
    torch.manual_seed(3)
    model = tiny_cnn(channels=(4, 6), hidden_size=8)
    before = state(model)
    trainer = run(tmp_path, method(capacities=(0.5,)), model, rounds=rounds)
    assert changed_channels(before, state(model), "small_cnn.convolutions.1.bias") == channels
    assert changed_channels(before, state(model), "classifier.bias") == [0, 1, 2, 3]
    held = trainer.rounds[0].metrics["held_share"]
    assert held == narrow_layout(model, 0.5).num_elements / StateLayout.of(model).num_elements


@pytest.mark.parametrize("method", [FedRolex, HeteroFL])
def test_a_client_is_evaluated_with_its_window_of_the_last_round(tmp_path, method):
    trainer = run(tmp_path, method((1.0, 0.5)), rounds=3)
    federation = trainer._federation_of_the_last_round()
    full = state(trainer.model)
    assert_equal_states(state(federation.personal_model(2)), full)
    window = [2, 3, 4] if method is FedRolex else [0, 1, 2]
    mine = state(federation.personal_model(1))
    # With the scale of a layer of 3 channels for 6.
    assert torch.equal(mine["small_cnn.convolutions.1.bias"], 2 * full["small_cnn.convolutions.1.bias"][window])


def test_statistics_are_those_of_the_widest_clients(tmp_path):
    data = hold_out_client_tests(tiny_image_federation(num_clients=4, client_size=60), test_share=0.1)
    torch.manual_seed(5)
    model = tiny_resnet(embedding_size=8, hidden_sizes=[8, 16])
    trainer = run(tmp_path, FedRolex((1.0, 0.5)), model, data, rounds=5, learning_rate=3e-2)
    assert trainer.evaluate()["eval_accuracy"] > 0.8  # one of four classes

    server = trainer._federation_of_the_last_round().server
    before = server.layout.views(server.bank_SP[0].clone())
    rows_mP = server.bank_SP.repeat(2, 1) + torch.tensor([[1.0], [2.0]])
    integers = [dict(server.integers[0]) for _ in range(2)]
    uploads = Uploads([0, 1], rows_mP, integers, torch.ones(2))
    FedRolex((1.0, 0.5)).update(server, uploads, ServerStep(server, None, 0, 0))
    after = server.layout.views(server.bank_SP[0])
    layer = "resnet.embedder.embedder.normalization"
    assert (after[f"{layer}.bias"] - before[f"{layer}.bias"]).tolist() == pytest.approx([1.5] * 4 + [1.0] * 4)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(after[f"{layer}.{name}"], before[f"{layer}.{name}"] + 1)


def test_narrower_models_are_evaluated_with_statistics_of_the_clients_own_examples(tmp_path):
    trainer = run(tmp_path, FedRolex((1.0, 0.5)), resnet(), rounds=1, per_device_eval_batch_size=5)
    federation = trainer._federation_of_the_last_round()
    model, outputs = federation.personal_model(1), []
    # The first convolution, scaled; 9 examples are batches of 5 and 4.
    stem = model.resnet.embedder.embedder
    for batch in federation.local_trainer.in_order(federation.participants.client_data(1), 0):
        outputs.append(stem.convolution(batch["pixel_values"]).detach())
    assert [len(maps) for maps in outputs] == [5, 4]
    measured = stem.normalization
    torch.testing.assert_close(measured.running_mean, sum(maps.mean((0, 2, 3)) for maps in outputs) / 2)
    torch.testing.assert_close(measured.running_var, sum(maps.var((0, 2, 3)) for maps in outputs) / 2)
    assert measured.momentum == 0.1


def test_strategies_refuse_what_they_cannot_cut(tmp_path):
    data, args = tiny_federation(), tiny_args(tmp_path)
    with pytest.raises(ValueError, match="HeteroFL cuts whole models, `model` is one with an adapter"):
        FederatedTrainer(
            tiny_expert(), args, data, strategy=HeteroFL(), peft_config=LoraConfig(target_modules=["query"])
        )
    with pytest.raises(ValueError, match="`model` is of the type 'gpt2', of which no narrower model can be made"):
        FederatedTrainer(tiny_gpt2(pad_token_id=1), args, data, strategy=FedRolex())
    frozen = tiny_expert()
    frozen.bert.embeddings.requires_grad_(False)
    with pytest.raises(ValueError, match="`model` has frozen parameters"):
        FederatedTrainer(frozen, args, data, strategy=FedRolex())
    with pytest.raises(
        ValueError, match="`keep_client_optimizer` is True, but 'fedrolex' does not promise to go on with"
    ):
        FederatedTrainer(tiny_expert(), tiny_args(tmp_path, keep_client_optimizer=True), data, strategy=FedRolex())
    with pytest.raises(ValueError, match="`upload_compression` is 'int8', but in 'fedrolex' no receiver knows"):
        FederatedTrainer(tiny_expert(), tiny_args(tmp_path, upload_compression="int8"), data, strategy=FedRolex())


@pytest.mark.parametrize("capacities", [(), (0.0,), (1.0, 1.5)])
def test_bad_capacities(capacities):
    with pytest.raises(ValueError, match="`capacities` is"):
        FedRolex(capacities)


def test_capacities_of_more_clients_than_there_are(tmp_path):
    with pytest.raises(ValueError, match="`capacities` has 5 entries for 4 clients: give each client one"):
        run(tmp_path, FedRolex())


def test_a_capacity_at_which_layers_vanish_is_refused_before_the_first_round(tmp_path):
    with pytest.raises(ValueError, match="loses or gains"):
        run(tmp_path, FedRolex((1.0, 0.25)), tiny_resnet(embedding_size=4, hidden_sizes=[3, 8]))
