"""The private mean: how much one client can move it, how much noise it has, and what else of a round it shows."""

import math

import pytest
import torch
from torch import nn

from hf_fedmoe.federation import (
    AdaptiveNorm,
    BrokenPromiseError,
    FixedNorm,
    GaussianMean,
    PlainMean,
    Server,
    Strategy,
    noise,
)
from hf_fedmoe.federation.noise import seeded_normals, system_normals
from hf_fedmoe.federation.private_mean import NORM
from hf_fedmoe.federation.uploads import KINDS, NotKeptError
from hf_fedmoe.weights import StateLayout


S = 0.5


class SharedWeight(Strategy):
    """Keeps the bias at home."""

    needs = "mean"

    def shared(self, server, round_index):
        return {"weight"}


def make_server(width=4):
    model = nn.Linear(width, 3)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    layout = StateLayout.of(model)
    return Server(model, model, layout, layout.bank([model]), [{}])


def mean_of(server, strategy=None, z=0.0, clipping=None, expected=2, noise=None):
    spent = []
    mean = GaussianMean(
        server,
        strategy or Strategy(),
        expected,
        num_clients=10,
        noise_multiplier=z,
        clipping=clipping or FixedNorm(S),
        noise=noise or seeded_normals(3),
        before_release=lambda: spent.append(server.bank_SP.clone()),
    )
    return mean, spent


def uploads_of(rows_kP, examples=7.0):
    k = len(rows_kP)
    return KINDS["mean"](list(range(k)), rows_kP, [{}] * k, torch.full((k,), examples), [{"loss": 1.0}] * k)


def rows_at(server, *sizes, names=("weight", "bias")):
    """Uploads whose every number has moved so far."""
    rows_kP = server.bank_SP[0].repeat(len(sizes), 1)
    for row_P, size in zip(rows_kP, sizes, strict=True):
        for name in names:
            server.layout.views(row_P)[name].add_(size)
    return rows_kP


def test_one_client_moves_the_sum_by_no_more_than_the_norm():
    sums = []
    # A client is left out, and another one's update becomes its opposite.
    for sizes in ((100.0, 0.01, 3.0), (100.0, 0.01), (100.0, 0.01, -3.0), (100.0, 0.01, 1e15)):
        server = make_server()
        mean, spent = mean_of(server)
        mean.uploads(uploads_of(rows_at(server, *sizes)), 0).average_into_(server)
        assert len(spent) == 1 and not spent[0].any()  # before the server has changed
        sums.append(2 * server.bank_SP[0])
    whole, without, opposite, absurd = sums
    assert (whole - without).norm().item() == pytest.approx(S)
    assert (whole - opposite).norm().item() == pytest.approx(2 * S)
    assert (absurd - without).norm().item() == pytest.approx(S)
    small = rows_at(make_server(), 0.01)[0]
    assert (without - small).norm().item() == pytest.approx(S)  # what is small goes in whole


def test_what_does_not_travel_is_neither_counted_nor_noised():
    server = make_server()
    mean, _ = mean_of(server, SharedWeight(), z=1.0)
    rows_kP = rows_at(server, 1.0, 1.0, names=("weight",))
    mean.uploads(uploads_of(rows_kP), 0).average_into_(server)
    views = server.layout.views(server.bank_SP[0])
    assert views["weight"].std() > 0.05 and not views["bias"].any()


@pytest.mark.parametrize("noise", [system_normals, seeded_normals(5)])
def test_noise_has_its_deviation(noise):
    server = make_server(width=40_000)
    mean, _ = mean_of(server, z=3.0, expected=5, noise=noise)
    mean.uploads(uploads_of(rows_at(server)), 0).average_into_(server)  # nobody came: noise alone
    found = server.layout.views(server.bank_SP[0])["weight"]
    deviation = 3 * S / 5
    assert found.std().item() == pytest.approx(deviation, rel=0.01)
    assert abs(found.mean().item()) < 4 * deviation / math.sqrt(found.numel())
    beyond = (found.abs() > 2 * deviation).float().mean().item()
    assert beyond == pytest.approx(math.erfc(math.sqrt(2)), rel=0.05)


def test_seeded_noise_follows_from_seed_and_round_and_the_systems_from_nothing():
    first, again, later = (seeded_normals(1)(r)(9) for r in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, later)
    assert not torch.equal(system_normals(0)(9), system_normals(0)(9))


@pytest.mark.parametrize("byte", [b"\x00", b"\xff"])
def test_no_draw_of_the_system_is_infinite(byte, monkeypatch):
    monkeypatch.setattr(noise.os, "urandom", lambda count: byte * count)
    drawn = system_normals(0)(2)
    assert drawn.isfinite().all() and 8 < drawn.abs().min() < 9


def test_absent_clients_are_those_who_did_not_move():
    server = make_server()
    server.bank_SP += 1
    mean, _ = mean_of(server, expected=4, clipping=FixedNorm(math.inf))
    mean.uploads(uploads_of(rows_at(server, 0.4)), 0).average_into_(server)
    torch.testing.assert_close(server.layout.views(server.bank_SP[0])["bias"], torch.full((3,), 1.1))
    # A method that averages over all clients divides by their number.
    mean.uploads(uploads_of(rows_at(server, 0.4)), 0).average_into_(server, num_examples=70)
    torch.testing.assert_close(server.layout.views(server.bank_SP[0])["bias"], torch.full((3,), 1.14))


def test_a_method_sees_nothing_else():
    server = make_server()
    uploads = mean_of(server)[0].uploads(uploads_of(rows_at(server, 1.0, 2.0)), 0)
    assert uploads.metrics == [] and uploads.weights_m.tolist() == [0.5, 0.5]  # not by examples
    for ask in (
        lambda: uploads.sum_of("control"),
        lambda: uploads.rows_mP,
        lambda: uploads.fuse_into_(server, torch.ones(1, 2), torch.zeros(1)),
    ):
        with pytest.raises(NotKeptError):
            ask()
    uploads.average_into_(server)
    with pytest.raises(NotKeptError, match="is there once"):  # another release
        uploads.average_into_(server)
    late = mean_of(server)[0].uploads(uploads_of(rows_at(server, 1.0)), 0)
    server.bank_SP += 1
    with pytest.raises(NotKeptError, match="into the row that participants started from"):
        late.average_into_(server)


def test_participants_must_start_alike():
    class EachItsOwn(Strategy):
        needs, compressible = "mean", True

        def download(self, server, client, kept_P):
            return server.bank_SP[0] + client

    server = make_server()
    with pytest.raises(BrokenPromiseError, match="`download` gives participants different rows"):
        mean_of(server, EachItsOwn())[0].uploads(uploads_of(rows_at(server, 1.0, 2.0)), 0)


def test_a_plain_mean_changes_nothing():
    uploads = uploads_of(rows_at(make_server(), 1.0))
    assert PlainMean().uploads(uploads, 0) is uploads and not PlainMean().may_be_empty


def test_the_norm_moves_to_the_quantile():
    server = make_server()
    clipping = AdaptiveNorm(S, quantile=0.5, expected=4)
    mean, _ = mean_of(server, clipping=clipping, expected=4)
    length = math.sqrt(15)  # of an update of ones
    uploads = mean.uploads(uploads_of(rows_at(server, *(norm / length for norm in (0.1, 1.0, 1.0, 1.0)))), 0)
    report = uploads.average_into_(server)
    # One of four is within: C exp(-0.2 (0.25 - 0.5)).
    assert report == {"clipping_norm": pytest.approx(S * math.exp(0.05))}
    assert clipping.norm(server) == server.tensors[NORM].item() == report["clipping_norm"]
    for _ in range(200):
        clipping.move(server, [0.1, 0.2, 0.9, 1.0], False, seeded_normals(0)(0))
    assert 0.2 <= clipping.norm(server) <= 0.9


def test_the_noise_of_the_count_is_taken_from_that_of_the_updates():
    clipping = AdaptiveNorm(S, quantile=0.5, expected=100)
    z = clipping.noise_of_updates(1.0)
    # Together they are as private as one Gaussian mechanism of noise multiplier 1: each count moves by 1/2.
    assert z > 1 and z**-2 + (0.5 / clipping.count_deviation) ** 2 == pytest.approx(1.0)
    assert clipping.noise_of_updates(0.0) == 0.0 and FixedNorm(S).noise_of_updates(1.0) == 1.0
    server = make_server()
    draws = [clipping.move(server, [], True, seeded_normals(i)(0))["clipping_norm"] for i in range(400)]
    steps = torch.tensor([S, *draws]).log().diff()  # -0.2 (noise / 100 + 0.5 - 0.5)
    assert steps.std().item() == pytest.approx(0.2 * 5 / 100, rel=0.15)
