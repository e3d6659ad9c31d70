import json
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_fedmoe.weights import (
    StateLayout,
    average_held_,
    fold_scales_,
    narrow_config,
    narrow_layout,
    narrow_model,
    put_held_,
    sub_places,
    take_held,
)
from hf_fedmoe.weights.sub_models import window
from tests.tiny_images import image_batch, make_statistics_different, tiny_cnn, tiny_resnet, tiny_vit
from tests.tiny_models import make_different, text_batch, tiny_bert, tiny_roberta


def test_windows_match_the_worked_example():
    data = json.loads((Path(__file__).parents[1] / "data" / "fedrolex.json").read_text())
    for name, channels in data["windows"].items():
        round_index, capacity = name.removeprefix("round ").split(", capacity ")
        kept = narrow_config(tiny_cnn(channels=(data["channels"],)).config, float(capacity)).channels[0]
        assert sorted(window(data["channels"], kept, int(round_index)).tolist()) == channels, name


def test_units_stay_together_and_windows_wrap_around():
    assert window(8, 4, 3, unit=2).tolist() == [6, 7, 0, 1]
    assert window(8, 4, 9).tolist() == [1, 2, 3, 4]


def held(wide, capacity, shift):
    """The narrower model of `wide` at these windows, in evaluation, and its places."""
    narrow = narrow_model(wide, capacity).eval()
    layouts = [StateLayout.of(model) for model in (wide, narrow)]
    places = sub_places(wide.config, *layouts, shift)
    layouts[1].write(take_held(layouts[0].read(wide), *layouts, places), narrow)
    return narrow, places


def test_small_cnn_by_hand():
    cnn = make_different(tiny_cnn(channels=(4, 6), hidden_size=(8, 5)))
    narrow, _ = held(cnn, 0.5, shift=5)
    first, second = cnn.small_cnn.convolutions
    hidden, last = cnn.small_cnn.hidden
    one, two, three, four = [1, 2], [5, 0, 1], [5, 6, 7, 0], [0, 1, 2]  # 5 mod 4, 6, 8, 5
    pixels = [4 * channel + position for channel in two for position in range(4)]
    found = narrow.small_cnn
    assert torch.equal(found.convolutions[0].weight, first.weight[one])
    assert torch.equal(found.convolutions[1].weight, second.weight[two][:, one])
    assert torch.equal(found.convolutions[1].bias, second.bias[two])
    assert torch.equal(found.hidden[0].weight, hidden.weight[three][:, pixels])
    assert torch.equal(found.hidden[1].weight, last.weight[four][:, three])
    assert torch.equal(narrow.classifier.weight, cnn.classifier.weight[:, four])
    assert torch.equal(narrow.classifier.bias, cnn.classifier.bias)


def keep_only_(wide, narrow, places):
    """Whatever the narrower model does not hold becomes zero."""
    layouts = [StateLayout.of(model) for model in (wide, narrow)]
    row_P = torch.zeros(layouts[0].size)
    put_held_(row_P, layouts[1].read(narrow), *layouts, places)
    layouts[0].write(row_P, wide)


def without_scale(model):
    for module in model.modules():
        module._forward_hooks.clear()
    return model


@torch.no_grad()
@pytest.mark.parametrize("shift", [0, 3])
@pytest.mark.parametrize("capacity", [1.0, 0.5, 0.3])
@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny_cnn(hidden_size=(6, 5)),
        tiny_resnet,
        lambda: tiny_resnet(layer_type="bottleneck", hidden_sizes=[16, 24]),
    ],
    ids=["small_cnn", "resnet", "bottleneck"],
)
def test_wide_model_with_zeros_elsewhere_computes_the_same(make, capacity, shift):
    wide = make_statistics_different(make_different(make()))
    narrow, places = held(wide, capacity, shift)
    keep_only_(wide, narrow, places)
    batch = image_batch()
    expected = wide(**batch).logits
    assert expected.std() > 1e-3
    torch.testing.assert_close(without_scale(narrow)(**batch).logits, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("make", [tiny_bert, tiny_roberta])
def test_attention_heads_stay_whole(make):
    wide = make_different(make(hidden_size=24, num_attention_heads=6, intermediate_size=10))
    narrow, _ = held(wide, 0.3, shift=5)
    config = narrow.config
    assert (config.num_attention_heads, config.hidden_size, config.intermediate_size) == (2, 8, 3)
    heads, channels = [20, 21, 22, 23, 0, 1, 2, 3], [5, 6, 7, 8, 9, 10, 11, 12]
    theirs, mine = (model.base_model.encoder.layer[1] for model in (wide, narrow))
    for name in ("query", "key", "value"):
        whole, part = (layer.attention.self.get_submodule(name) for layer in (theirs, mine))
        assert torch.equal(part.weight, whole.weight[heads][:, channels])
        assert torch.equal(part.bias, whole.bias[heads])
    whole, part = (layer.attention.output.dense for layer in (theirs, mine))
    assert torch.equal(part.weight, whole.weight[channels][:, heads])
    assert torch.equal(part.bias, whole.bias[channels])
    assert torch.equal(mine.output.dense.weight, theirs.output.dense.weight[channels][:, [5, 6, 7]])
    assert torch.equal(mine.output.LayerNorm.weight, theirs.output.LayerNorm.weight[channels])
    words = [model.base_model.embeddings.word_embeddings.weight for model in (wide, narrow)]
    assert torch.equal(words[1], words[0][:, channels])
    # The heads that are kept attend as they do in the wide model, where the other channels are silent.
    inputs_BTH = torch.zeros(2, 3, 24)
    inputs_BTH[:, :, channels] = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    expected_BTH = theirs.attention.self(inputs_BTH)[0][:, :, heads]
    found_BTH = without_scale(narrow).base_model.encoder.layer[1].attention.self(inputs_BTH[:, :, channels])[0]
    torch.testing.assert_close(found_BTH, expected_BTH)
    assert torch.isfinite(narrow(**text_batch()).logits).all()


def test_what_is_cut_is_scaled_by_the_share_that_is_left():
    wide = tiny_cnn(channels=(4, 5), hidden_size=8)
    narrow = narrow_model(wide, 0.5)
    image = image_batch()["pixel_values"]
    scales = []
    for module, inputs in (
        (narrow.small_cnn.convolutions[0], image),
        (narrow.small_cnn.convolutions[1], image[:, :2]),
        (narrow.small_cnn.hidden[0], torch.ones(1, 12)),
        (narrow.classifier, torch.ones(1, 4)),
    ):
        scaled = module(inputs)
        scales.append((scaled / module.forward(inputs)).median().item())
    assert scales == pytest.approx([2.0, 5 / 3, 2.0, 1.0])
    embeddings = narrow_model(tiny_bert(), 0.5).bert.embeddings.word_embeddings
    torch.testing.assert_close(embeddings(torch.tensor([3])), 2 * embeddings.weight[3:4])
    assert not any(module._forward_hooks for module in narrow_model(wide, 1.0).modules())


@torch.no_grad()
@pytest.mark.parametrize(
    ("make", "batch"), [(tiny_cnn, image_batch), (tiny_resnet, image_batch), (tiny_bert, text_batch)]
)
def test_weights_that_hold_the_scales_are_the_model_alone(make, batch):
    wide = make()
    narrow = narrow_model(wide, 0.5).eval()
    scaled = narrow(**batch()).logits
    fold_scales_(narrow, wide)
    alone = type(wide)(narrow.config).eval()
    alone.load_state_dict(narrow.state_dict())
    torch.testing.assert_close(alone(**batch()).logits, scaled)
    assert torch.equal(narrow(**batch()).logits, alone(**batch()).logits)


def test_layout_without_memory_is_that_of_the_model():
    for wide in (tiny_cnn(), tiny_resnet(), tiny_bert()):
        assert narrow_layout(wide, 0.5) == StateLayout.of(narrow_model(wide, 0.5))
        assert narrow_layout(wide, 1.0) == StateLayout.of(wide)


@pytest.mark.parametrize("make", [tiny_cnn, tiny_resnet, tiny_bert], ids=["small_cnn", "resnet", "bert"])
def test_windows_reach_every_element(make):
    wide = make()
    layout = StateLayout.of(wide)

    def reached(capacity, rounds):
        row_P = torch.zeros(layout.size)
        narrow = narrow_layout(wide, capacity)
        for shift in range(rounds):
            places = sub_places(wide.config, layout, narrow, shift)
            put_held_(row_P, torch.ones(narrow.size), layout, narrow, places)
        return layout.views(row_P)

    assert all(view.all() for view in reached(0.7, 48).values())
    # Half the channels: of a square matrix what is half the way round apart is never in one window.
    for name, view in reached(0.5, 48).items():
        assert view.all() or (view.dim() > 1 and view.shape[0] == view.shape[1]), name
    assert not all(view.all() for view in reached(0.7, 1).values())


def test_mean_over_those_who_hold_an_element_by_hand():
    wide = nn.BatchNorm1d(3)
    layout = StateLayout.of(wide)
    row_P = torch.full((layout.size,), 7.0)
    uploads_mP = torch.zeros(2, layout.size)
    for upload_P, weight, mean, variance in zip(uploads_mP, (1.0, 4.0), (2.0, 6.0), (1.0, 3.0), strict=True):
        views = layout.views(upload_P)
        views["weight"].fill_(weight), views["running_mean"].fill_(mean), views["running_var"].fill_(variance)
    places_m = [dict.fromkeys(layout.views(row_P), (torch.tensor(index),)) for index in ([0], [1, 0])]
    counts_P = average_held_(row_P, uploads_mP, places_m, layout)
    views = layout.views(row_P)
    assert views["weight"].tolist() == [2.5, 4.0, 7.0] and views["bias"].tolist() == [0.0, 0.0, 7.0]
    assert views["running_mean"].tolist() == [4.0, 6.0, 7.0]
    assert views["running_var"].tolist() == [(1 + 4 + 3 + 36) / 2 - 16, 3.0, 7.0]
    assert layout.views(counts_P)["weight"].tolist() == [2.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (tiny_vit, "`model` is of the type 'vit', of which no narrower model can be made: choose one of bert"),
        (
            lambda: tiny_resnet(embedding_size=4, hidden_sizes=[3, 8]),
            r"capacity of 0.25 a SmallImageResNet.* loses or gains `resnet.encoder.stages.0.*shortcut",
        ),
    ],
)
def test_models_that_cannot_be_cut(make, message):
    with pytest.raises(ValueError, match=message):
        narrow_layout(make(), 0.25)
