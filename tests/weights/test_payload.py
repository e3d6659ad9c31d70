import pytest
import torch
from torch import nn

from hf_fedmoe.weights import Payload, StateLayout, payload_fault


@pytest.fixture
def layout():
    return StateLayout.of(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))


def payload(layout, **changes):
    integers = {"1.num_batches_tracked": torch.tensor(4)}
    fields = {"row_P": torch.ones(layout.size), "integers": integers, "num_examples": 5} | changes
    return Payload(**fields)


def test_bytes_are_those_of_the_state_without_padding(layout):
    # 6 + 2 for the linear layer, 4 x 2 for the normalisation, in float32; one int64 counter.
    assert payload(layout).num_bytes(layout) == (8 + 8) * 4 + 8


def test_sound_payload_has_no_fault(layout):
    assert payload_fault(payload(layout), layout) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_named(layout, value):
    row_P = torch.ones(layout.size)
    layout.views(row_P)["0.bias"][1] = value
    assert "`0.bias` holds values that are not finite" in payload_fault(payload(layout, row_P=row_P), layout)


def test_misshapen_and_empty_payloads_are_refused(layout):
    assert "expected" in payload_fault(payload(layout, row_P=torch.ones(3)), layout)
    assert "float64" in payload_fault(payload(layout, row_P=torch.ones(layout.size).double()), layout)
    assert "num_examples = 0" in payload_fault(payload(layout, num_examples=0), layout)
