"""
The logic of captured passes, by a stand-in for CUDA graphs that does the work anew; tests/training/test_on_gpu.py has
the graphs.
"""

import random
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_fedmoe.federation.captured_passes import MOST_GRAPHS, CapturedPasses
from hf_fedmoe.strategies import own_loss
from tests.eager_graphs import TIMES_SEEN, EagerGraph, IdleGraph, refused_graph, stand_in


class Model(nn.Module):
    """Has all that a pass may leave behind: statistics, dropout, a parameter without a gradient."""

    def __init__(self, draws=lambda: 0.0):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)
        self.idle, self.draws = nn.Parameter(torch.ones(2)), draws

    def forward(self, x):
        hidden = nn.functional.dropout(self.norm(self.first(x)).relu(), 0.5, self.training)
        return SimpleNamespace(loss=(self.last(hidden) + self.draws()).square().mean())


@pytest.fixture(autouse=True)
def eager_graphs(monkeypatch):
    stand_in(monkeypatch)


def plain_pass(model):
    def plain(loss, batch, weight, count):
        value = loss(model, batch)
        (value * weight / count).backward()
        return value.detach() * weight / count

    return plain


def passes(model):
    return CapturedPasses(model, plain_pass(model), nullcontext, {})


def batches(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(size, 3, generator=generator)} for size in sizes]


def trained(model, take, steps, loss=own_loss):
    """Losses, and all that training leaves, after steps of one or more batches each."""
    torch.manual_seed(1)
    optimizer, losses = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.1), []
    for step in steps:
        losses += [take(loss, batch, 0.5, len(step)).item() for batch in step]
        optimizer.step()
        optimizer.zero_grad()
    return losses, [*model.state_dict().values(), torch.get_rng_state()]


def assert_same(found, expected):
    assert found[0] == expected[0]
    for one, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def two_models(**kwargs):
    models = [Model(**kwargs), Model(**kwargs)]
    models[1].load_state_dict(models[0].state_dict())
    return models


def test_training_leaves_the_same_bits():
    steps = [[batch] for batch in batches(*[4, 4, 4, 4, 2, 4, 2, 2, 2, 5])]
    one, other = two_models()
    assert_same(trained(one, passes(one), steps), trained(other, plain_pass(other), steps))
    # One pass is compared and the others are training: of the shape 4 two, of the shape 2 one.
    assert [graph.replays for graph in EagerGraph.made] == [1 + 2, 1 + 1]
    torch.testing.assert_close(one.idle, torch.ones(2), rtol=0, atol=0)


def test_gradients_of_captured_and_plain_passes_add_up():
    sizes = [(4, 4), (4, 3), (3, 4), (4, 4), (3, 3), (3, 4), (4, 3)]
    steps = [batches(*pair) for pair in sizes]
    one, other = two_models()
    assert_same(trained(one, passes(one), steps), trained(other, plain_pass(other), steps))
    assert len(EagerGraph.made) == 2


def test_a_shape_is_captured_when_it_has_come_often_enough():
    model = Model()
    take = passes(model)
    for number, (batch,) in enumerate([batches(4)] * TIMES_SEEN, 1):
        take(own_loss, batch, 1.0, 1)
        assert len(EagerGraph.made) == (number == TIMES_SEEN)
    for size in range(5, 5 + 2 * MOST_GRAPHS):
        for _ in range(TIMES_SEEN):
            take(own_loss, *batches(size), 1.0, 1)
    assert len(EagerGraph.made) == MOST_GRAPHS


def test_what_else_differs_has_a_graph_of_its_own():
    model = Model()
    take, (batch,) = passes(model), batches(4)

    def often(weight=1.0):
        for _ in range(TIMES_SEEN):
            take(own_loss, batch, weight, 1)

    often()
    often(weight=0.5)
    model.eval()
    often()
    model.first.requires_grad_(False)
    often()
    assert len(EagerGraph.made) == 4


def test_a_loss_of_ones_own_is_never_captured():
    called, model = [], Model()

    def loss(model, batch):
        called.append(1)
        return own_loss(model, batch)

    trained(model, passes(model), [batches(4)] * 6, loss)
    assert len(called) == 6 and not EagerGraph.made


def test_a_model_that_draws_on_the_host_stays_plain():
    models = two_models(draws=random.random)
    random.seed(0)
    found = trained(models[0], passes(models[0]), [batches(4)] * 6)
    random.seed(0)
    assert_same(found, trained(models[1], plain_pass(models[1]), [batches(4)] * 6))
    assert not EagerGraph.made


def test_a_replay_that_is_wrong_is_not_used(monkeypatch):
    stand_in(monkeypatch, IdleGraph)
    one, other = two_models()
    assert_same(trained(one, passes(one), [batches(4)] * 6), trained(other, plain_pass(other), [batches(4)] * 6))


def test_what_cannot_be_captured_stays_plain(monkeypatch):
    stand_in(monkeypatch, refused_graph)
    one, other = two_models()
    assert_same(trained(one, passes(one), [batches(4)] * 6), trained(other, plain_pass(other), [batches(4)] * 6))


def test_a_model_whose_memory_has_moved_is_captured_anew():
    model = Model()
    take, (batch,) = passes(model), batches(4)
    for _ in range(TIMES_SEEN):
        take(own_loss, batch, 1.0, 1)
    model.first.weight.data = model.first.weight.data.clone()
    for _ in range(2):
        take(own_loss, batch, 1.0, 1)
    assert len(EagerGraph.made) == 2


class Mean(Model):
    """Has a running mean that each pass makes anew."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return super().forward(x - self.mean)


def test_a_model_that_replaces_its_buffers_stays_plain():
    models = Mean(), Mean()
    models[1].load_state_dict(models[0].state_dict())
    steps = [[batch] for batch in batches(*[4] * 8)]
    assert_same(trained(models[0], passes(models[0]), steps), trained(models[1], plain_pass(models[1]), steps))
    assert not EagerGraph.made
