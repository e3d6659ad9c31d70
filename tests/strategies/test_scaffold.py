"""SCAFFOLD against Algorithm 1 written out for single numbers."""

import pytest
import torch

from hf_fedmoe.strategies import FedAvg, Scaffold, ServerStep, Strategy, Uploads
from hf_fedmoe.training import FederatedTrainer
from tests.tiny_client import tiny_local, tiny_server, tiny_task
from tests.tiny_federation import tiny_args, tiny_expert, tiny_federation


# (x, y) of two clients, whose optima are 1 and -2, and whose curvatures and numbers of examples differ.
CLIENTS = [[(1.0, 1.0)], [(2.0, -4.0), (2.0, -4.0), (2.0, -4.0)]]
STEPS, RATE = 5, 0.05
# Of sum of x (w x - y) over all examples.
OPTIMUM = (1 * 1 + 3 * -8) / (1 * 1 + 3 * 4)


def gradient(w: float, examples: list[tuple[float, float]]) -> float:
    return sum((w * x - y) * x for x, y in examples) / len(examples)


def by_hand(rounds: list[list[int]]) -> tuple[float, float]:
    """Returns w and c after rounds of these participants, by option II."""
    w, c, own = 0.0, 0.0, [0.0, 0.0]
    total = sum(map(len, CLIENTS))
    for chosen in rounds:
        ends, changes = [], []
        for client in chosen:
            y = w
            for _ in range(STEPS):
                y -= RATE * (gradient(y, CLIENTS[client]) - own[client] + c)
            new = own[client] - c + (w - y) / (STEPS * RATE)
            changes.append(len(CLIENTS[client]) / total * (new - own[client]))
            own[client] = new
            ends.append((len(CLIENTS[client]), y))
        w = sum(n * y for n, y in ends) / sum(n for n, _ in ends)
        c += sum(changes)
    return w, c


def by_strategy(tmp_path, strategy: Strategy, rounds: list[list[int]]) -> tuple[float, dict[str, torch.Tensor]]:
    """Returns the server's w and its tensors after rounds of these participants."""
    local = tiny_local(tmp_path, strategy, RATE, num_train_epochs=STEPS)
    server = tiny_server(local, 0.0)
    server.num_examples = sum(map(len, CLIENTS))
    strategy.setup(server, len(CLIENTS))
    kept: list[dict[str, torch.Tensor]] = [{}, {}]
    for round_index, chosen in enumerate(rounds):
        rows_mP, sent = torch.zeros(len(chosen), local.layout.size, dtype=torch.float64), []
        for place, client in enumerate(chosen):
            task = tiny_task(local, server.model.w.item(), CLIENTS[client], **kept[client])
            task.received.tensors = strategy.download_tensors(server, client)
            task.out_P = rows_mP[place]
            payload, kept[client] = strategy.train_client(local, task)
            sent.append(payload.tensors)
        examples_m = torch.tensor([float(len(CLIENTS[client])) for client in chosen], dtype=torch.float64)
        uploads = Uploads(chosen, rows_mP, [{}] * len(chosen), examples_m, tensors=sent)
        strategy.update(server, uploads, ServerStep(server, None, round_index, 0))
    return server.model.w.item(), server.tensors


@pytest.mark.parametrize("rounds", [[[0, 1]], [[0, 1]] * 4, [[1], [0], [1, 0], [0]]], ids=["one", "all", "some"])
def test_rounds_by_hand(tmp_path, rounds):
    w, tensors = by_strategy(tmp_path, Scaffold(), rounds)
    expected_w, expected_c = by_hand(rounds)
    assert w == pytest.approx(expected_w, rel=1e-12)
    assert tensors["control_D"].tolist() == pytest.approx([expected_c], rel=1e-12)


def test_it_ends_at_the_common_optimum_where_averages_of_drifting_clients_do_not(tmp_path):
    rounds = [[0, 1]] * 60
    assert by_strategy(tmp_path, Scaffold(), rounds)[0] == pytest.approx(OPTIMUM, abs=1e-6)
    assert abs(by_strategy(tmp_path, FedAvg(), rounds)[0] - OPTIMUM) > 0.05


def test_scaled_gradients_are_refused_before_the_run(tmp_path):
    args = tiny_args(tmp_path)
    args.fp16 = True
    with pytest.raises(ValueError, match=r"`fp16` is True, .* choose `bf16=True`"):
        FederatedTrainer(tiny_expert(), args, tiny_federation(), Scaffold())
    args = tiny_args(tmp_path, max_update_norm=2.0)
    with pytest.raises(ValueError, match=r"`max_update_norm` is 2.0, but control variates move the server too"):
        FederatedTrainer(tiny_expert(), args, tiny_federation(), Scaffold())
