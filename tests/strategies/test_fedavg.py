import json
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_fedmoe.strategies import FedAvg, FedAvgMovingAverage, FedAvgReserved, FedProx, Server, ServerStep, Uploads
from hf_fedmoe.weights import StateLayout


def server_and_uploads():
    """A seven-parameter model and four clients: the numbers of the worked example."""
    data = json.loads((Path(__file__).parents[1] / "data" / "server_steps.json").read_text())
    model = nn.Linear(7, 1, bias=False).double()
    layout = StateLayout.of(model)
    bank_SP = layout.bank([model])
    bank_SP[0, :7] = torch.tensor(data["global_P"], dtype=torch.float64)
    rows_mP = torch.zeros(4, layout.size, dtype=torch.float64)
    rows_mP[:, :7] = torch.tensor(data["clients_mP"], dtype=torch.float64)
    server = Server(model, model, layout, bank_SP, [{}])
    examples = torch.tensor(data["examples_m"], dtype=torch.float64)
    return data, server, Uploads([0, 1, 2, 3], rows_mP, [{}] * 4, examples)


def test_fedavg_matches_the_worked_example():
    data, server, uploads = server_and_uploads()
    FedAvg().update(server, uploads, ServerStep(server, None, 0, 0))
    expected = torch.tensor(data["fedavg_P"], dtype=torch.float64)
    torch.testing.assert_close(server.model.weight[0], expected, atol=1e-10, rtol=0)


def test_moving_average_by_hand():
    data, server, uploads = server_and_uploads()
    strategy = FedAvgMovingAverage(rate=0.25)
    strategy.setup(server, 4)
    first = torch.tensor(data["fedavg_P"], dtype=torch.float64)
    strategy.update(server, uploads, ServerStep(server, None, 0, 0))
    torch.testing.assert_close(server.model.weight[0], first)
    uploads.rows_mP[:, :7] += 1.0
    strategy.update(server, uploads, ServerStep(server, None, 5, 0))
    torch.testing.assert_close(server.model.weight[0], first + 0.25)
    torch.testing.assert_close(strategy.download(server, 0, None)[:7], first + 1.0)


def test_fedprox_loss_by_hand():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([1.0, 3.0]))

        def forward(self, x):
            return type("Output", (), {"loss": (self.weight * x).sum()})

    model, received = Model(), {"weight": torch.tensor([0.0, 1.0])}
    loss = FedProx(mu=0.5).loss(model, {"x": torch.tensor([2.0, 2.0])}, received)
    assert loss.item() == pytest.approx(8 + 0.25 * (1 + 4))
    loss.backward()
    torch.testing.assert_close(model.weight.grad, torch.tensor([2.0 + 0.5 * 1, 2.0 + 0.5 * 2]))


def test_bad_settings():
    with pytest.raises(ValueError, match="`mu` is -1"):
        FedProx(mu=-1)
    with pytest.raises(ValueError, match="`when` is 'never'"):
        FedAvgReserved(when="never")
