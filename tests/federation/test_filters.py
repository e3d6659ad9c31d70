"""Filters change payloads as they say, and the bytes that are counted."""

import pytest
import torch
from torch import nn

from hf_fedmoe.federation import ClientTask, Server, Strategy, make_filters
from hf_fedmoe.federation.filters import ENCODED, RESIDUAL, Clip, Compress, Private, Ranks
from hf_fedmoe.weights import Payload, StateLayout, make_codec
from tests.tiny_federation import tiny_args


COUNT = "1.num_batches_tracked"


class SharedBody(Strategy):
    """Keeps the linear layer's bias at home."""

    def shared(self, server, round_index):
        return {"0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var", COUNT}


@pytest.fixture
def server():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    layout = StateLayout.of(model)
    return Server(model, model, layout, layout.bank([model]), [layout.read_integers(model)])


def task_and_upload(server, step=1.0, **kept):
    """A client whose every element has moved by `step`, and which sends three numbers beside its model."""
    received = Payload(server.bank_SP[0].clone(), server.integers[0])
    out_P = received.row_P.clone()
    for view in server.layout.views(out_P).values():
        view += step
    upload = Payload(out_P, {COUNT: torch.tensor(7)}, 5, {"loss": 1.0}, {"beside": torch.zeros(3)})
    upload.weigh(server.layout)
    return ClientTask(0, 0, None, received, out_P, 0, kept), upload


def moved(server, upload):
    before = server.layout.views(server.bank_SP[0])
    return {name: view - before[name] for name, view in server.layout.views(upload.row_P).items()}


def test_private_tensors_stay_and_are_not_counted(server):
    task, upload = task_and_upload(server)
    filter = Private(server, SharedBody())
    assert filter.upload(upload, task) == {}
    update = moved(server, upload)
    assert not update.pop("0.bias").any()
    for change in update.values():
        torch.testing.assert_close(change, torch.ones_like(change))
    assert upload.sizes.keys() == {*server.layout.sizes, COUNT} - {"0.bias"}
    # 6 + 2 x 2 + 2 x 2 floats, a count, three floats.
    assert upload.num_bytes == (6 + 4 + 4) * 4 + 8 + 3 * 4
    sent = Payload(server.bank_SP[0], server.integers[0])
    sent.weigh(server.layout)
    filter.download(sent, 0, 0)
    assert sent.num_bytes == (6 + 4 + 4) * 4 + 8


def test_clipping_shortens_what_travels_and_leaves_statistics(server):
    task, upload = task_and_upload(server, step=2.0)
    Private(server, SharedBody()).upload(upload, task)
    Clip(server.layout, 3.0).upload(upload, task)
    update = moved(server, upload)
    # Ten parameters travel, and have the norm 2 x 10^0.5.
    for name in ("0.weight", "1.weight", "1.bias"):
        torch.testing.assert_close(update[name], torch.full_like(update[name], 3 / 10**0.5))
    assert (
        not update["0.bias"].any() and (update["1.running_mean"] == 2).all() and (update["1.running_var"] == 2).all()
    )


@pytest.mark.parametrize("max_norm", [12**0.5 * 2.001, float("inf")])
def test_updates_of_a_smaller_norm_keep_their_bits(server, max_norm):
    task, upload = task_and_upload(server, step=2.0)
    before_P = upload.row_P.clone()
    Clip(server.layout, max_norm).upload(upload, task)
    assert torch.equal(upload.row_P, before_P)


def test_an_update_that_is_not_finite_is_left_to_the_check(server):
    task, upload = task_and_upload(server, step=float("inf"))
    Clip(server.layout, 1.0).upload(upload, task)
    assert upload.row_P.isinf().any() and not upload.row_P.isnan().any()


def test_what_is_encoded_counts_in_the_place_of_the_model(server):
    task, upload = task_and_upload(server)
    filter = Compress(server.layout, make_codec("top_k", 0.25))
    retained = filter.upload(upload, task)
    # Three of the twelve parameters, 8 bytes each, and four statistics.
    assert upload.sizes == {COUNT: 8, ENCODED: 3 * 8 + 4 * 4}
    assert retained[RESIDUAL].sum() == 9
    task, upload = task_and_upload(server, 0.0, residual_U=retained[RESIDUAL])
    assert filter.upload(upload, task)[RESIDUAL].sum() == 6


def test_nothing_shared_leaves_the_residual_where_it_is(server):
    task, upload = task_and_upload(server, residual_U=torch.ones(12))
    upload.weigh(server.layout, {COUNT})
    assert torch.equal(Compress(server.layout, make_codec("top_k")).upload(upload, task)[RESIDUAL], torch.ones(12))
    assert upload.sizes == {COUNT: 8} and upload.num_bytes == 8 + 3 * 4


def test_they_come_in_the_order_in_which_an_upload_needs_them(server):
    filters = make_filters(server, Strategy(), 0, max_update_norm=1.0, codec=make_codec("bf16"))
    assert [type(filter) for filter in filters] == [Private, Clip, Compress]
    assert [type(filter) for filter in make_filters(server, Strategy(), 0)] == [Private]
    assert Ranks(server, Strategy(), [8, 4], 0).rank(3) == 4 and Ranks(server, Strategy(), None, 0).rank(3) is None


def test_bad_norms_are_refused(tmp_path):
    for norm in (0.0, -1.0):
        with pytest.raises(ValueError, match=rf"`max_update_norm` is {norm}: give a norm above 0"):
            tiny_args(tmp_path, max_update_norm=norm)
