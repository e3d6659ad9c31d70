import pytest
import torch
from torch import nn

from hf_fedmoe.weights import Payload, StateLayout, all_finite, negative_variance, payload_fault


COUNT = "1.num_batches_tracked"


@pytest.fixture
def layout():
    return StateLayout.of(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))


def payload(layout, **changes):
    integers = {COUNT: torch.tensor(4)}
    fields = {"row_P": torch.ones(layout.size), "integers": integers, "num_examples": 5} | changes
    return Payload(**fields)


def fault(layout, **changes):
    """Makes an upload of a client that is registered with 12 examples."""
    known = Payload(torch.zeros(layout.size), {COUNT: torch.tensor(0)}, 12)
    return payload_fault(payload(layout, **changes), layout, known)


def row(layout, name, value):
    row_P = torch.ones(layout.size)
    layout.views(row_P)[name][1] = value
    return row_P


def test_bytes_are_those_of_the_state_without_padding(layout):
    # 6 + 2 for the linear layer, 4 x 2 for the normalisation, in float32; one int64 counter.
    sent = payload(layout, tensors={"control": torch.zeros(3, dtype=torch.float64)})
    sent.weigh(layout)
    assert sent.num_bytes == (8 + 8) * 4 + 8 + 3 * 8
    sent.weigh(layout, {"0.bias", COUNT})
    assert sent.sizes == {"0.bias": 2 * 4, COUNT: 8} and sent.num_bytes == 2 * 4 + 8 + 3 * 8


def test_values_beside_the_model_must_be_finite(layout):
    tensors = {"control": torch.tensor([1.0, float("nan")])}
    assert fault(layout, tensors=tensors) == (
        "`control`, which it sends beside the model, holds values that are not finite"
    )


def test_values_beside_the_model_whose_squares_overflow_are_named(layout):
    assert "`control` holds 1e+30, too much to compute" in fault(layout, tensors={"control": torch.tensor([1e30])})
    counts = {"count": torch.tensor([2**62]), "nothing": torch.zeros(0), "large": torch.tensor([1e18])}
    assert fault(layout, tensors=counts) is None


def test_sound_payload_has_no_fault(layout):
    assert fault(layout) is None
    assert fault(layout, num_examples=12, metrics={"loss": 0.5, "steps": 3}, integers={}) is None
    assert fault(layout, row_P=row(layout, "1.running_var", 0.0)) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_named(layout, value):
    assert "`0.bias` holds values that are not finite" in fault(layout, row_P=row(layout, "0.bias", value))


@pytest.mark.parametrize("value", [1e30, -1e20])
def test_values_whose_squares_have_no_finite_sum_are_named(layout, value):
    # 16 elements: the square of (max / 16) ** 0.5 is just short of it.
    assert f"`0.bias` holds {abs(value):.3g}, too much" in fault(layout, row_P=row(layout, "0.bias", value))
    assert fault(layout, row_P=row(layout, "0.bias", 4.6e18)) is None
    assert "above 4.61e+18" in fault(layout, row_P=row(layout, "0.bias", 4.7e18))


def test_a_variance_below_zero_is_named(layout):
    assert fault(layout, row_P=row(layout, "1.running_var", -0.5)) == (
        "`1.running_var` holds -0.5, and no variance is below 0"
    )
    assert fault(layout, row_P=row(layout, "1.running_mean", -0.5)) is None
    rows_SP = torch.stack([row(layout, "1.running_var", value) for value in (0.1, -0.25, 0.0)])
    assert "holds -0.25" in negative_variance(rows_SP, layout) and negative_variance(rows_SP[[0, 2]], layout) is None


def test_padding_counts_too(layout):
    row_P = torch.ones(layout.size)
    row_P[-1] = float("inf")
    assert fault(layout, row_P=row_P) == "its padding holds inf"


def test_misshapen_and_empty_payloads_are_refused(layout):
    assert "expected" in fault(layout, row_P=torch.ones(3))
    assert "expected" in fault(layout, row_P=torch.ones(1, layout.size))
    assert "float64" in fault(layout, row_P=torch.ones(layout.size).double())


@pytest.mark.parametrize("value", [0, -3, 13, 10**9, float("nan"), float("inf")])
def test_examples_that_the_client_cannot_have_are_refused(layout, value):
    assert fault(layout, num_examples=value) == f"it reports num_examples = {value}, and is registered with 12"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_reports_that_are_not_finite_are_refused(layout, value):
    assert fault(layout, metrics={"steps": 3, "loss": value}) == f"it reports loss = {value}"


@pytest.mark.parametrize(
    ("integers", "message"),
    [
        ({COUNT: torch.tensor(-1)}, "`1.num_batches_tracked` is -1, which is no count of batches"),
        ({COUNT: torch.tensor(2**62)}, f"is {2**62}, which"),
        ({COUNT: torch.tensor(4.0)}, "it sends () of torch.float32 as `1.num_batches_tracked`, expected () of"),
        ({COUNT: torch.tensor([4])}, r"it sends (1,) of torch.int64 as"),
        ({"2.steps": torch.tensor(4)}, "it sends () of torch.int64 as `2.steps`, expected nothing"),
    ],
)
def test_integers_that_the_server_does_not_have_are_refused(layout, integers, message):
    assert message in fault(layout, integers=integers)


def test_finite_or_not():
    assert all_finite([torch.ones(2, 3), torch.zeros(0), torch.tensor(5), torch.tensor(1.0, dtype=torch.bfloat16)])
    assert not all_finite([torch.ones(2), torch.tensor([[1.0], [float("nan")]])])
    assert not all_finite([torch.tensor(-float("inf"))]) and all_finite([])
