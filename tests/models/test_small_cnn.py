import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from hf_fedmoe.models import SmallCNNConfig, SmallCNNForImageClassification, SmallCNNModel
from hf_fedmoe.weights.layout import StateLayout
from tests.tiny_images import image_batch, tiny_cnn


PFEDMOE = {"num_labels": 10, "num_channels": 3, "image_size": 32, "padding": 0}


def num_parameters(**config) -> int:
    with torch.device("meta"):
        return SmallCNNForImageClassification(SmallCNNConfig(**config)).num_parameters()


@pytest.mark.parametrize(
    ("config", "flat_size", "expected"),
    [
        ({"num_labels": 62}, 3136, 6_603_710),
        ({"num_labels": 62, "padding": 0}, 1024, 2_278_334),
        (PFEDMOE | {"channels": (16, 32), "hidden_size": (2000, 500)}, 800, 2_621_558),
        (PFEDMOE | {"channels": (16, 16), "hidden_size": (2000, 500)}, 400, 1_815_142),
        (PFEDMOE | {"channels": (16, 32), "hidden_size": (1000, 500)}, 800, 1_320_558),
        (PFEDMOE | {"channels": (16, 32), "hidden_size": (800, 500)}, 800, 1_060_358),
        (PFEDMOE | {"channels": (16, 32), "hidden_size": (500, 500)}, 800, 670_058),
    ],
)
def test_published_sizes(config, flat_size, expected):
    assert SmallCNNConfig(**config).flat_size == flat_size
    assert num_parameters(**config) == expected


def test_body_with_several_heads_has_the_size_of_pfedmm():
    config = SmallCNNConfig(num_labels=62, padding=0)
    with torch.device("meta"):
        body = SmallCNNModel(config)
        heads = [nn.Linear(config.hidden_sizes[-1], 62) for _ in range(3)]
    assert body.num_parameters() + sum(p.numel() for head in heads for p in head.parameters()) == 2_532_410


@pytest.mark.parametrize("hidden_size", [6, (7, 5)])
@pytest.mark.parametrize("padding", [0, 2])
def test_forward_is_the_published_sequence(hidden_size, padding):
    model = tiny_cnn(image_size=16, num_channels=1, kernel_size=5, padding=padding, hidden_size=hidden_size)
    body, convolutions = model.small_cnn, model.small_cnn.convolutions
    layers = [convolutions[0], nn.ReLU(), nn.MaxPool2d(2), convolutions[1], nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    for layer in body.hidden:
        layers += [layer, nn.ReLU()]
    images = image_batch(5, 1, 16)["pixel_values"]
    labels = torch.tensor([0, 1, 2, 3, 0])
    features_BH = nn.Sequential(*layers)(images)
    torch.testing.assert_close(body(images).pooler_output, features_BH)
    out = model(images, labels=labels)
    torch.testing.assert_close(out.logits, model.classifier(features_BH))
    torch.testing.assert_close(out.loss, nn.functional.cross_entropy(out.logits, labels))
    loss, logits = model(images, labels=labels, return_dict=False)
    assert torch.equal(logits, out.logits)
    assert torch.equal(loss, out.loss)


def test_starts_as_torch_does():
    torch.manual_seed(0)
    model = tiny_cnn(hidden_size=400)
    layer = model.small_cnn.hidden[0]
    bound = layer.in_features**-0.5
    for tensor in (layer.weight, layer.bias):
        assert 0.95 * bound < tensor.abs().max().item() <= bound
        assert tensor.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_round_trip_is_bit_equal(tmp_path):
    model = tiny_cnn(hidden_size=(7, 5))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert isinstance(loaded, SmallCNNForImageClassification)
    assert (loaded.config.channels, loaded.config.hidden_size) == ((3, 4), (7, 5))
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert torch.equal(loaded(**image_batch()).logits, model(**image_batch()).logits)
    body = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(
        body(**image_batch()).pooler_output, model.small_cnn(image_batch()["pixel_values"]).pooler_output
    )
    other = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert other.classifier.out_features == 7


def test_config_round_trip(tmp_path):
    config = SmallCNNConfig(**PFEDMOE, channels=[16, 16], hidden_size=[2000, 500])
    assert (config.channels, config.hidden_size, config.hidden_sizes) == ((16, 16), (2000, 500), (2000, 500))
    assert SmallCNNConfig().hidden_sizes == (2048,)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict() | {"_name_or_path": str(tmp_path)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 0}, "`image_size` is 0: pass an integer of at least 1"),
        ({"image_size": (28, 28)}, r"`image_size` is \(28, 28\)"),
        ({"num_channels": 0}, "`num_channels` is 0"),
        ({"kernel_size": 2.5}, "`kernel_size` is 2.5"),
        ({"padding": -1}, "`padding` is -1: pass an integer of at least 0"),
        ({"channels": ()}, r"`channels` is \(\): pass positive integers"),
        ({"hidden_size": (2000, 0)}, r"`hidden_size` is \(2000, 0\)"),
        ({"hidden_size": 0}, "`hidden_size` is 0"),
        ({"image_size": 15, "padding": 0}, "`image_size` is 15, of which 2 convolutions with `kernel_size` = 5 and"),
    ],
)
def test_config_errors_name_field_value_and_remedy(arguments, message):
    with pytest.raises(ValueError, match=message):
        SmallCNNConfig(**arguments)


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 3, 8, 9), (2, 3, 9, 9), (3, 8, 8)])
def test_images_of_another_shape(shape):
    with pytest.raises(ValueError, match="`num_channels` = 3 and `image_size` = 8 ask for") as error:
        tiny_cnn()(torch.zeros(shape))
    assert f"`pixel_values` has the shape {shape}" in str(error.value)


def test_layout_has_no_statistics():
    model = tiny_cnn()
    layout = StateLayout.of(model)
    assert (layout.batchnorm, layout.integers) == ((), ())
    assert layout.num_elements == model.num_parameters()
