"""The server's reading of a compressed upload, and how many bytes it took."""

import pytest
import torch
from torch import nn

from hf_fedmoe.weights import COMPRESSIONS, StateLayout, compress_upload, make_codec


@pytest.fixture
def layout():
    return StateLayout.of(nn.Sequential(nn.Linear(30, 20), nn.BatchNorm1d(20)))


def rows(layout, seed=0):
    """A received row and a trained one; both with the padding at zero."""
    generator = torch.Generator().manual_seed(seed)
    received_P, trained_P = torch.zeros(2, layout.size)
    for name, view in layout.views(received_P).items():
        view.copy_(torch.rand(view.shape, generator=generator))
        change = 0.1 * torch.randn(view.shape, generator=generator)
        layout.views(trained_P)[name].copy_(view + change)
    return received_P, trained_P


NUM_UPDATED = 30 * 20 + 20 + 20 + 20  # without the running statistics of BatchNorm


def num_bytes(sent):
    return sum(tensor.nbytes for tensor in sent.values())


def test_nothing_to_do():
    assert make_codec("none") is None


def test_bf16(layout):
    received_P, trained_P = rows(layout)
    row_P = trained_P.clone()
    sent, residual = compress_upload(make_codec("bf16"), layout, row_P, received_P, None)
    assert (num_bytes(sent), residual) == (2 * NUM_UPDATED, None)
    expected_P = received_P + (trained_P - received_P).bfloat16().float()
    for name, view in layout.views(row_P).items():
        whole = "running" in name
        assert torch.equal(view, layout.views(trained_P if whole else expected_P)[name]), name
    assert not torch.equal(row_P, trained_P)


def test_int8_is_within_half_a_step_of_each_block(layout):
    received_P, trained_P = rows(layout)
    layout.views(trained_P)["0.weight"][0, 0] += 100  # makes the steps of its own block coarse, and of no other
    row_P = trained_P.clone()
    sent, _ = compress_upload(make_codec("int8"), layout, row_P, received_P, None)
    assert num_bytes(sent) == NUM_UPDATED + 3 * 4
    update, read = (
        torch.cat([(layout.views(row)[name] - layout.views(received_P)[name]).flatten() for name in ("0.weight",)])
        for row in (trained_P, row_P)
    )
    for block, block_read in zip(update.split(256), read.split(256), strict=True):
        half_step = block.abs().max() / 127 / 2
        assert (block - block_read).abs().max() <= half_step * 1.01 + 1e-7
    assert (update[256:] - read[256:]).abs().max() < 0.003


def test_a_block_without_change_stays_as_it_is(layout):
    received_P, _ = rows(layout)
    row_P = received_P.clone()
    compress_upload(make_codec("int8"), layout, row_P, received_P, None)
    assert torch.equal(row_P, received_P)


def test_top_k_sends_the_largest_entries_and_keeps_the_rest(layout):
    received_P, trained_P = rows(layout)
    row_P = trained_P.clone()
    sent, residual_U = compress_upload(make_codec("top_k", 0.1), layout, row_P, received_P, None)
    assert num_bytes(sent) == 66 * 8
    names = ["0.weight", "0.bias", "1.weight", "1.bias"]
    trained_U, read_U, received_U = (
        torch.cat([layout.views(row)[name].flatten() for name in names]) for row in (trained_P, row_P, received_P)
    )
    sent_U = read_U != received_U
    assert sent_U.sum() == 66
    update_U = trained_U - received_U
    assert update_U[sent_U].abs().min() >= update_U[~sent_U].abs().max()
    torch.testing.assert_close(read_U[sent_U], trained_U[sent_U])
    torch.testing.assert_close(residual_U, torch.where(sent_U, 0.0, update_U))


@pytest.mark.parametrize("place", [-1, 660])
def test_places_beyond_the_update_are_refused_before_anything_is_written(place, layout):
    codec = make_codec("top_k", 0.1)
    sent = {"places": torch.tensor([3, place], dtype=torch.int32), "values": torch.ones(2)}
    with pytest.raises(IndexError, match=r"places from -?\d+ to \d+, of 660 entries"):
        codec.decode(sent, 660)


def test_error_feedback_loses_nothing_over_rounds(layout):
    """Sum of what was read and of what still waits is the sum of all updates."""
    codec, residual_U, read, wanted = make_codec("top_k", 0.05), None, 0.0, 0.0
    for round_index in range(5):
        received_P, trained_P = rows(layout, round_index)
        row_P = trained_P.clone()
        _, residual_U = compress_upload(codec, layout, row_P, received_P, residual_U)
        read += layout.views(row_P)["0.weight"] - layout.views(received_P)["0.weight"]
        wanted += layout.views(trained_P)["0.weight"] - layout.views(received_P)["0.weight"]
    torch.testing.assert_close(read + residual_U[:600].view(20, 30), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("compression", [name for name in COMPRESSIONS if name != "none"])
def test_what_is_not_finite_stays_so(layout, compression):
    for value in (float("nan"), float("inf")):
        received_P, row_P = rows(layout)
        layout.views(row_P)["0.bias"][3] = value
        compress_upload(make_codec(compression), layout, row_P, received_P, None)
        assert not row_P.isfinite().all()


def test_a_share_of_one_sends_everything(layout):
    received_P, trained_P = rows(layout)
    row_P = trained_P.clone()
    _, residual_U = compress_upload(make_codec("top_k", 1.0), layout, row_P, received_P, None)
    torch.testing.assert_close(row_P, trained_P)
    assert not residual_U.any()


def test_bad_settings():
    with pytest.raises(ValueError, match="`upload_compression` is 'zip': choose one of 'none', 'bf16'"):
        make_codec("zip")
    with pytest.raises(ValueError, match="`top_k_share` is 0"):
        make_codec("top_k", 0)
