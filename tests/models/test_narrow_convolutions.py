"""The backward of narrow convolutions stays within its memory, and computes what it did."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from hf_fedmoe.models import guard_narrow_convolutions
from tests.tiny_images import image_batch, runs_at_risk, tiny_resnet, tiny_stock_resnet


def gradients(convolution, maps):
    maps = maps.clone().requires_grad_(True)
    found = convolution(maps)
    found.square().sum().backward()
    return [found.detach(), maps.grad, convolution.weight.grad]


@pytest.mark.parametrize("stride", [2, 3, (1, 2), (3, 1)])
@pytest.mark.parametrize("size", [(12, 12), (6, 9), (13, 12), (2, 1), (1, 1)])
def test_values_and_gradients_are_those_without_the_guard(stride, size):
    torch.manual_seed(0)
    plain = nn.Conv2d(5, 7, 1, stride, dtype=torch.float64)
    guarded = guard_narrow_convolutions(guard_narrow_convolutions(copy.deepcopy(plain)))
    maps = torch.randn(3, 5, *size, dtype=torch.float64)
    for expected, found in zip(gradients(plain, maps), gradients(guarded, maps), strict=True):
        torch.testing.assert_close(found, expected)
    assert torch.equal(guarded(input=maps), guarded(maps)) and torch.equal(guarded(maps[0]), guarded(maps)[0])


def test_only_narrow_convolutions_at_risk_change_what_they_read():
    kinds = {
        "narrow": nn.Conv2d(15, 16, 1, 2),
        "of few channels a group": nn.Conv2d(32, 32, 1, 2, groups=4),
        "wide": nn.Conv2d(16, 16, 1, 2),
        "without a stride": nn.Conv2d(4, 16, 1),
        "padded": nn.Conv2d(4, 16, 1, 2, padding=1),
        "larger": nn.Conv2d(4, 16, 3, 2, padding=1),
    }
    guard_narrow_convolutions(nn.ModuleList(kinds.values()))
    guarded = [name for name, module in kinds.items() if module._forward_pre_hooks]
    assert guarded == ["narrow", "of few channels a group"]


@pytest.mark.parametrize("make", [tiny_resnet, tiny_stock_resnet])
def test_a_model_is_at_risk_without_the_guard_and_not_with_it(make):
    model, images = make(), image_batch(image_size=16)
    for guarded in (False, True):
        with runs_at_risk() as risks:
            before = model(**images).logits
            copy.deepcopy(model)(**images)
        assert bool(risks) is not guarded
        guard_narrow_convolutions(model)
    torch.testing.assert_close(model(**images).logits, before)


# Without the guard one aborts or finds other gradients: 4 channels on CPUs with AVX2, 12 with AVX-512.
REPEATED = """
import torch
from hf_fedmoe.models import guard_narrow_convolutions

for channels, size in ((4, 8), (7, 32), (12, 64)):
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        convolution = guard_narrow_convolutions(torch.nn.Conv2d(channels, 16, 1, 2, bias=False))
        convolution.to(memory_format=memory_format)
        maps = torch.randn(8, channels, size, size).contiguous(memory_format=torch.channels_last)
        expected = torch.einsum("bnyx,boyx->on", maps[..., ::2, ::2], torch.ones(8, 16, size // 2, size // 2))
        for _ in range(30):
            convolution.zero_grad()
            convolution(maps.clone().requires_grad_(True)).sum().backward()
            torch.testing.assert_close(convolution.weight.grad[..., 0, 0], expected, atol=1e-3, rtol=1e-4)
print("fine")
"""


def test_repeated_backwards_neither_abort_nor_go_wrong():
    """In a process of its own: what writes beyond its memory takes down whoever runs it."""
    found = subprocess.run([sys.executable, "-c", REPEATED], capture_output=True, text=True, timeout=300)
    assert (found.returncode, found.stdout) == (0, "fine\n"), found.stderr
