"""Batches of one row, of which BatchNorm after a pooled layer has no statistics."""

import itertools

import numpy as np
import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification

from hf_fedmoe.data import FederatedDataset
from hf_fedmoe.models import FedMoEForImageClassification
from hf_fedmoe.strategies import FedAvgReserved
from hf_fedmoe.training import FederatedTrainer, FedMoETrainer
from tests.tiny_federation import assert_equal_states, state, tiny_args
from tests.tiny_images import tiny_cnn, tiny_image_federation, tiny_processor, tiny_resnet


def deep_resnet(num_labels=4):
    """Its last layers see one pixel of 8x8 images."""
    torch.manual_seed(5)
    sizes = dict(embedding_size=4, hidden_sizes=[4, 6, 6], depths=[1, 1, 1])
    return ResNetForImageClassification(ResNetConfig(**sizes, layer_type="basic", num_labels=num_labels)).eval()


def clients_of(*sizes, reserved_size=None):
    pool = tiny_image_federation().pool
    ends = np.cumsum([0, *sizes])
    rows = [np.arange(start, end) for start, end in itertools.pairwise(ends)]
    reserved = None if reserved_size is None else np.arange(ends[-1], ends[-1] + reserved_size)
    return FederatedDataset(pool, rows, reserved=reserved)


def trained(output_dir, data, model=None, kind=FederatedTrainer, strategy=None, **changes):
    args = tiny_args(output_dir, **{"rounds": 2, "clients_per_round": data.num_clients} | changes)
    rest = {} if strategy is None else {"strategy": strategy}
    trainer = kind(model or deep_resnet(), args, train_dataset=data, processing_class=tiny_processor(), **rest)
    trainer.train()
    return trainer


@pytest.mark.parametrize("sizes", [(9, 12), (5, 5)])
@pytest.mark.parametrize("clients_at_once", [1, 2])
def test_clients_whose_last_batch_has_one_row_are_trained(tmp_path, sizes, clients_at_once):
    trainer = trained(tmp_path, clients_of(*sizes), clients_at_once=clients_at_once)
    assert [list(report.refused) for report in trainer.rounds] == [[], []]


def test_the_reserved_set_has_no_last_row_by_itself(tmp_path):
    """33 examples in batches of 32 train experts, the gate and a fine-tuned model alike."""
    data = clients_of(6, 6, reserved_size=33)
    trained(tmp_path / "average", data, strategy=FedAvgReserved())
    mixture = FedMoEForImageClassification.from_expert(deep_resnet(), num_routed_experts=2, gate=deep_resnet(2))
    trained(tmp_path / "mixture", data, mixture, FedMoETrainer)


@pytest.mark.parametrize(
    ("sizes", "reserved_size", "changes", "message"),
    [
        ((1, 8, 1), None, {}, "only one row of client 0, client 2, but the ResNetForImageClassification normalises"),
        ((6, 8), None, {"per_device_train_batch_size": 1}, "`per_device_train_batch_size` is 1, but the ResNet"),
        ((6, 8), 1, {}, "only one row of the reserved set, but"),
    ],
)
def test_who_has_a_single_row_is_named_before_the_start(tmp_path, sizes, reserved_size, changes, message):
    strategy = FedAvgReserved() if reserved_size else None
    model = deep_resnet()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, clients_of(*sizes, reserved_size=reserved_size), model, strategy=strategy, **changes)
    assert_equal_states(state(model), before)


@pytest.mark.parametrize("make", [tiny_cnn, tiny_resnet])
def test_models_that_read_a_single_row_are_trained_on_it(tmp_path, make):
    """Without BatchNorm, or with more than one pixel after it."""
    trainer = trained(tmp_path, clients_of(1, 8), make())
    assert not any(report.refused for report in trainer.rounds)
