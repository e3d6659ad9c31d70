import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetForImageClassification,
)

from hf_fedmoe.models import SmallImageResNetConfig, SmallImageResNetForImageClassification
from hf_fedmoe.weights.fusion import fuse_
from hf_fedmoe.weights.layout import StateLayout
from tests.tiny_images import image_batch, make_statistics_different, tiny_resnet
from tests.tiny_models import make_different


def tiny_mobilenet() -> MobileNetV2ForImageClassification:
    config = MobileNetV2Config(num_labels=4, depth_multiplier=0.25, min_depth=4, depth_divisible_by=4)
    return MobileNetV2ForImageClassification(config).eval()


def test_resnet18_for_32_pixels():
    with torch.device("meta"):
        model = SmallImageResNetForImageClassification(SmallImageResNetConfig(num_labels=10))
        stages = model.resnet(torch.empty(2, 3, 32, 32), output_hidden_states=True).hidden_states
    assert model.num_parameters() == 11_173_962
    assert [tuple(stage.shape[1:]) for stage in stages] == [
        (64, 32, 32),
        (64, 32, 32),
        (128, 16, 16),
        (256, 8, 8),
        (512, 4, 4),
    ]
    layout = StateLayout.of(model)
    assert len(layout.batchnorm) == 20  # the stem's, two in each of 8 layers, three shortcuts
    assert len(layout.integers) == 20
    assert all(name.endswith("num_batches_tracked") for name in layout.integers)
    assert layout.num_elements == 11_173_962 + sum(2 * mean.shape.numel() for mean, _ in layout.batchnorm)


def test_mobilenet_v2_on_32_pixels():
    with torch.device("meta"):
        model = MobileNetV2ForImageClassification(MobileNetV2Config(num_labels=10))
    assert model.num_parameters() == 2_236_682
    layout = StateLayout.of(model)
    assert len(layout.batchnorm) == len(layout.integers) == 52
    assert tiny_mobilenet()(**image_batch(2, image_size=32)).logits.shape == (2, 4)


def test_stem_is_initialised_as_the_other_layers():
    torch.manual_seed(0)
    model = tiny_resnet(embedding_size=64, hidden_sizes=[64, 64])
    convolution = model.resnet.embedder.embedder.convolution
    assert (convolution.kernel_size, convolution.stride, convolution.padding) == ((3, 3), (1, 1), (1, 1))
    assert convolution.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)
    assert isinstance(model, ResNetForImageClassification)


@pytest.mark.parametrize("make", [tiny_resnet, tiny_mobilenet])
def test_round_trip_is_bit_equal(tmp_path, make):
    model = make_statistics_different(make_different(make()))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    batch = image_batch(2, image_size=32)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("make", [tiny_resnet, tiny_mobilenet])
def test_fused_variances_follow_the_mixture_rule(make):
    clients = [make_statistics_different(make_different(make(), seed=seed), seed) for seed in (1, 2)]
    server = make()
    layout = StateLayout.of(server)
    bank_SP = layout.bank([server])
    uploads_mP = torch.stack([layout.read(client) for client in clients])
    fuse_(bank_SP, uploads_mP, torch.tensor([[0.3, 0.7]]), torch.zeros(1), layout.batchnorm)

    first, second = (client.state_dict() for client in clients)
    norms = [name for name, module in server.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == len(layout.batchnorm)
    for name, value in server.state_dict().items():
        if not value.is_floating_point():
            continue
        expected = 0.3 * first[name] + 0.7 * second[name]
        if name.endswith("running_var"):
            mean = name.removesuffix("var") + "mean"
            squares = 0.3 * first[mean].square() + 0.7 * second[mean].square()
            expected = expected + squares - (0.3 * first[mean] + 0.7 * second[mean]).square()
            assert (value > 0.49).all()
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    assert server(**image_batch(2, image_size=32)).logits.isfinite().all()
