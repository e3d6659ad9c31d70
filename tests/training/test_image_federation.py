"""Federations of image classifiers: the collators, BatchNorm, resuming, and what is refused before training."""

import pytest
import torch
from peft import LoraConfig

from hf_fedmoe.data import AUGMENTATIONS, ImageCollator
from hf_fedmoe.models import FedMoEForImageClassification
from hf_fedmoe.training import FederatedTrainer, FedMoETrainer
from tests.tiny_federation import assert_equal_states, interrupted_and_resumed, state, tiny_args
from tests.tiny_images import (
    IMAGE_FAMILIES,
    tiny_cnn,
    tiny_image_federation,
    tiny_processor,
    tiny_resnet,
    tiny_vit,
)


PHOTOGRAPHS = ImageCollator(tiny_processor(), AUGMENTATIONS["photographs"])


def mixture_trainer(output_dir, family=tiny_resnet, train_collator=None, **changes) -> FedMoETrainer:
    torch.manual_seed(5)
    model = FedMoEForImageClassification.from_expert(family(), num_routed_experts=2)
    args = tiny_args(output_dir, **changes)
    return FedMoETrainer(
        model,
        args,
        train_dataset=tiny_image_federation(),
        processing_class=tiny_processor(),
        train_data_collator=train_collator,
    )


@pytest.mark.parametrize("family", [tiny_cnn, tiny_resnet])
def test_a_mixture_learns_images(tmp_path, family):
    trainer = mixture_trainer(tmp_path, family, rounds=8, num_train_epochs=4, clients_per_round=4)
    untrained = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] > max(0.6, untrained)


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_a_round_of_every_family(tmp_path, family):
    trainer = mixture_trainer(tmp_path, IMAGE_FAMILIES[family], rounds=1)
    before = state(trainer.model)
    trainer.train()
    assert all(len(report.refused) == 0 for report in trainer.rounds)
    changed = [name for name, value in state(trainer.model).items() if not torch.equal(value, before[name])]
    assert len(changed) > 0.9 * len(before)


def test_adapters_of_an_image_classifier(tmp_path):
    torch.manual_seed(5)
    base, adapters = tiny_vit(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    frozen = state(base)
    model = FedMoEForImageClassification.from_expert(base, num_routed_experts=2, peft_config=adapters)
    args = tiny_args(tmp_path, rounds=2)
    trainer = FedMoETrainer(
        model,
        args,
        train_dataset=tiny_image_federation(),
        processing_class=tiny_processor(),
        train_data_collator=PHOTOGRAPHS,
    )
    assert not model.training and not model.base.training
    trainer.train()
    head, factors = 4 * 9, 2 * 2 * 2 * 2 * 8
    assert [report.bytes_up for report in trainer.rounds] == [2 * 4 * (head + factors)] * 2
    experts = [dict(expert.named_parameters()) for expert in model.experts]
    assert all(any(p.any() for name, p in expert.items() if ".lora_B." in name) for expert in experts)
    kept = model.base.get_base_model().state_dict()
    assert all(torch.equal(kept[name], value) for name, value in frozen.items() if name in kept)
    assert len(kept.keys() & frozen.keys()) > 20


class Calls:
    """A collator that remembers whether it was called while the experts were frozen."""

    def __init__(self, collate):
        self.collate, self.sizes = collate, []

    def __call__(self, examples):
        self.sizes.append(len(examples))
        return self.collate(examples)


def test_training_has_a_collator_of_its_own(tmp_path):
    plain, augmenting = Calls(ImageCollator(tiny_processor())), Calls(PHOTOGRAPHS)
    trainer = mixture_trainer(tmp_path, rounds=1, train_collator=augmenting)
    trainer.data_collator = plain
    trainer.train()
    # Two of the clients and two of the reserved set on trial, 2 clients of 12 examples in batches of 4, then 5 final
    # epochs of 3 experts over 24 reserved examples in batches of 32.
    assert augmenting.sizes == [2, 2] + [4] * 6 + [24] * 15
    # Two validation rows of the trial, then the reserved set's inputs: probing, gate and experts see it as it is.
    assert plain.sizes == [2] + [8] * 3
    trainer.evaluate()
    assert plain.sizes == [2] + [8] * 3 + [8, 8, 4]


def test_without_an_image_collator_the_processor_makes_one(tmp_path):
    trainer = mixture_trainer(tmp_path)
    assert trainer.data_collator is trainer.train_data_collator and trainer.data_collator.shape == (3, 8, 8)
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "preprocessor_config.json").is_file()


@pytest.mark.parametrize("settings", [{}, {"preset": "paper", "keep_client_optimizer": True}, {"expert_epochs": 1}])
def test_a_resumed_run_with_augmentation_and_batchnorm_equals_an_uninterrupted_one(tmp_path, settings):
    arguments = {"rounds": 4, "save_strategy": "steps", "client_choice": "stratified", **settings}

    whole = mixture_trainer(tmp_path / "whole", train_collator=PHOTOGRAPHS, **arguments)
    whole.train()
    resumed = interrupted_and_resumed(
        lambda: mixture_trainer(tmp_path / "resumed", train_collator=PHOTOGRAPHS, **arguments)
    )
    assert_equal_states(state(resumed.model), state(whole.model))
    statistics = [name for name in state(whole.model) if name.endswith("running_var")]
    assert statistics and all((state(whole.model)[name] != 1).any() for name in statistics)


def test_batch_counts_of_batchnorm_reach_the_saved_model(tmp_path):
    trainer = mixture_trainer(tmp_path, rounds=2, final_expert_epochs=0)
    trainer.train()
    counts = {name: count.item() for name, count in state(trainer.model).items() if "num_batches_tracked" in name}
    assert set(counts.values()) == {6}  # two rounds of three batches, whichever client they come from


@pytest.mark.parametrize(
    ("model", "processor", "message"),
    [
        (lambda: tiny_cnn(num_channels=1), tiny_processor(3), r"shape \(3, 8, 8\).*`num_channels` = 1"),
        (lambda: tiny_cnn(image_size=10), tiny_processor(3), r"shape \(3, 8, 8\).*`image_size` = 10"),
        (lambda: tiny_resnet(num_channels=1), tiny_processor(3), r"shape \(3, 8, 8\).*channel dimension"),
        (lambda: tiny_resnet(), tiny_processor(1), r"is 192 bytes, but the image processor makes.*\(1, 8, 8\)"),
    ],
)
def test_images_of_another_shape_are_refused_before_training(tmp_path, model, processor, message):
    run = FederatedTrainer(model(), tiny_args(tmp_path), tiny_image_federation(), processing_class=processor)
    with pytest.raises(ValueError, match=message):
        run.train()
