"""
The logic of captured steps, by a stand-in for CUDA graphs that does the work anew; tests/training/test_on_gpu.py has
the graphs.
"""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from hf_fedmoe.federation.captured_passes import CapturedPasses
from hf_fedmoe.federation.local_updates import CapturedUpdates, LocalUpdates
from hf_fedmoe.strategies import own_loss
from tests.eager_graphs import TIMES_SEEN, EagerGraph, IdleGraph, refused_graph, stand_in
from tests.federation.test_captured_passes import batches, plain_pass, two_models


OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 0.1, weight_decay=0.1),
    "adam": lambda parameters: torch.optim.Adam(parameters, 0.1),
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "groups": lambda parameters: torch.optim.AdamW(
        [{"params": parameters[:1], "lr": 0.3}, {"params": parameters[1:], "weight_decay": 0.0}], 0.1
    ),
}


@pytest.fixture(autouse=True)
def eager_graphs(monkeypatch):
    stand_in(monkeypatch)


def parameters(device="cpu"):
    return [nn.Parameter(tensor.to(device)) for tensor in (torch.ones(3), torch.full((2, 2), 0.5), torch.ones(1))]


def clients(make, kind, num_clients=3, num_steps=5, keep=False, device="cpu"):
    """Weights after each of some clients who start alike, each with gradients of its own and a falling rate."""
    weights, start = parameters(device), [p.detach().clone() for p in parameters(device)]
    optimizer = make(weights)
    arguments = (optimizer, lambda: torch.nn.utils.clip_grad_norm_(weights, 1.0))
    updates = LocalUpdates(*arguments) if kind is LocalUpdates else CapturedUpdates(*arguments, {})
    generator, found, kept = torch.Generator().manual_seed(0), [], None
    for _ in range(num_clients):
        for weight, value in zip(weights, start, strict=True):
            weight.data.copy_(value)
        updates.reset(kept)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / num_steps)
        for _ in range(num_steps):
            for weight in weights[:2]:  # the last one has no gradient
                weight.grad = 3 * torch.randn(weight.shape, generator=generator).to(device)
            updates()
            schedule.step()
            optimizer.zero_grad()
        found.append([weight.detach().clone() for weight in weights])
        kept = updates.tensors() if keep else None
    return found, updates


def assert_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_clients_end_with_the_same_weights(name, keep):
    found, updates = clients(OPTIMIZERS[name], CapturedUpdates, keep=keep)
    expected, plain = clients(OPTIMIZERS[name], LocalUpdates, keep=keep)
    assert_close(found, expected)
    (graph,) = EagerGraph.made
    # All steps but those before it, and the compared one in the place of the one that it is compared with.
    assert graph.replays == 15 - (TIMES_SEEN - 1)
    assert found[0][2].item() == 1
    tensors = updates.tensors()
    assert tensors.keys() == plain.tensors().keys()
    for key, tensor in plain.tensors().items():
        torch.testing.assert_close(tensors[key], tensor, rtol=1e-5, atol=1e-6)


def test_a_step_of_other_gradients_or_settings_is_plain():
    weights = parameters()
    optimizer = torch.optim.SGD(weights, 0.5)
    updates = CapturedUpdates(optimizer, lambda: None, {})

    def step(count):
        for weight in weights[:count]:
            weight.grad = torch.ones_like(weight)
        updates()
        optimizer.zero_grad()

    for _ in range(TIMES_SEEN):
        step(2)
    replays = EagerGraph.made[0].replays
    step(3)
    optimizer.param_groups[0]["weight_decay"] = 0.1
    step(2)
    assert EagerGraph.made[0].replays == replays
    assert weights[2].item() == 0.5
    assert weights[0][0].item() == pytest.approx(-1.0 - 0.5 * (1 - 0.1))


@pytest.mark.parametrize(
    "make",
    [
        lambda weights: torch.optim.SGD(weights, 0.1, momentum=0.9, dampening=0.5),
        lambda weights: torch.optim.AdamW(weights, 0.1, amsgrad=True),
        lambda weights: torch.optim.Adagrad(weights, 0.1),
    ],
)
def test_an_optimizer_whose_fresh_state_is_not_of_zeros_stays_plain(make):
    found, _ = clients(make, CapturedUpdates)
    assert_close(found, clients(make, LocalUpdates)[0])
    assert not EagerGraph.made


def test_a_replay_that_is_wrong_is_not_used(monkeypatch):
    stand_in(monkeypatch, IdleGraph)
    found, updates = clients(OPTIMIZERS["adamw"], CapturedUpdates)
    assert_close(found, clients(OPTIMIZERS["adamw"], LocalUpdates)[0])
    assert updates._captured is None


def test_what_cannot_be_captured_stays_plain(monkeypatch):
    stand_in(monkeypatch, refused_graph)
    found, _ = clients(OPTIMIZERS["momentum"], CapturedUpdates)
    assert_close(found, clients(OPTIMIZERS["momentum"], LocalUpdates)[0])


def test_captured_passes_and_steps_go_together():
    """Shapes are captured before and after the step is, which leaves zeros in the gradients' memory."""
    models, found = two_models(), []
    sizes = [4, 4, 4, 4, 3, 4, 3, 4, 3, 3, 2, 4, 2, 2, 2, 5]
    for number, model in enumerate(models):
        # A bias before BatchNorm has gradients that are 0 but for rounding.
        optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.1, eps=1e-3)
        clip = lambda model=model: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # noqa: E731
        take, update, grads = plain_pass(model), LocalUpdates(optimizer, clip), {}
        if number == 0:
            take, update = CapturedPasses(model, take, nullcontext, grads), CapturedUpdates(optimizer, clip, grads)
        torch.manual_seed(0)
        losses = []
        for _ in range(2):
            update.reset(None)
            for pair in zip(*[iter(batches(*sizes))] * 2, strict=True):
                losses += [take(own_loss, batch, 1.0, 2).item() for batch in pair]
                update()
        found.append((losses, [*model.state_dict().values()]))
    assert len(EagerGraph.made) == 4
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_parameter_without_a_gradient_is_left_alone_after_a_replay(name):
    """Its moments are not 0 then, and would move it."""

    def run(kind):
        weights = parameters()
        optimizer = OPTIMIZERS[name](weights)
        updates = kind(optimizer, lambda: None, *([{}] if kind is CapturedUpdates else []))
        for count in (3, 3, 3, 3, 2, 3, 1, 1, 3):
            sum((weight * weight).sum() for weight in weights[:count]).backward()  # adds to what is there
            updates()
        return [[weight.detach().clone() for weight in weights]]

    assert_close(run(CapturedUpdates), run(LocalUpdates))
    assert EagerGraph.made[0].replays > 3
