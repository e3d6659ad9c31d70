"""FedAdagrad, FedAdam and FedYogi against the algorithm written out for single numbers."""

import math

import pytest
import torch
from torch import nn

from hf_fedmoe.strategies import FedAdagrad, FedAdam, FedYogi, Server, ServerStep, Uploads
from hf_fedmoe.weights import StateLayout


STARTS, WAYS = [1.0, -2.0, 0.5], [[0.1, -0.3, 0.0], [0.2, 0.1, -0.05], [-0.4, 0.0, 0.02]]


class Model(nn.Module):
    """Three numbers, and a statistic that no optimizer may touch."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(STARTS, dtype=torch.float64))
        self.register_buffer("statistic", torch.zeros(1, dtype=torch.float64))


def by_hand(x, ways, moment, beta1, eta, tau):
    delta, v = 0.0, tau**2
    for way in ways:
        v = moment(v, way**2)
        delta = beta1 * delta + (1 - beta1) * way
        x += eta * delta / (math.sqrt(v) + tau)
    return x


@pytest.mark.parametrize(
    ("strategy", "moment"),
    [
        (FedAdagrad(0.1, 0.5, 0.01), lambda v, square: v + square),
        (FedAdam(0.1, 0.5, 0.01, beta2=0.8), lambda v, square: 0.8 * v + 0.2 * square),
        (FedYogi(0.1, 0.5, 0.01, beta2=0.8), lambda v, square: v - 0.2 * square * math.copysign(1, v - square)),
    ],
    ids=["fedadagrad", "fedadam", "fedyogi"],
)
def test_three_rounds_by_hand(strategy, moment):
    model = Model()
    layout = StateLayout.of(model)
    server = Server(model, model, layout, layout.bank([model]), [{}])
    strategy.setup(server, 2)
    for round_index, ways in enumerate(WAYS):
        rows_mP = server.bank_SP[0].repeat(2, 1)
        for row_P, sign in zip(rows_mP, (3.0, 1.0), strict=True):
            # Of clients of 1 and 3 examples, whose mean is the way: one goes thrice as far, the other a third of it.
            views = layout.views(row_P)
            views["w"] += torch.tensor(ways, dtype=torch.float64) * (sign if sign == 3 else 1 / 3)
            views["statistic"].fill_(sign)
        uploads = Uploads([0, 1], rows_mP, [{}] * 2, torch.tensor([1.0, 3.0], dtype=torch.float64))
        strategy.update(server, uploads, ServerStep(server, None, round_index, 0))
        assert model.statistic.item() == pytest.approx((3 + 3 * 1) / 4)
    for place, start in enumerate(STARTS):
        expected = by_hand(start, [ways[place] for ways in WAYS], moment, 0.5, 0.1, 0.01)
        assert model.w[place].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"server_learning_rate": -1}, "`server_learning_rate` is -1"),
        ({"beta1": 1.0}, "`beta1` is 1.0"),
        ({"beta2": 1.5}, "`beta2` is 1.5"),
        ({"tau": 0.0}, "`tau` is 0.0"),
    ],
)
def test_settings_out_of_their_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        FedYogi(**settings)
