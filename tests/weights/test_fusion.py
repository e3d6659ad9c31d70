import json
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_fedmoe.weights import StateLayout, add_to_sum_, collapse, fuse_, fuse_integers, fusion, mean_of_sum_


VECTORS = Path(__file__).parents[1] / "data"


def load(name):
    return json.loads((VECTORS / f"{name}.json").read_text())


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("correlation", ["sum", "mean", "relevance"])
def test_one_fed_moe_update_matches_the_worked_example(correlation):
    data = load("fedmoe_round")
    lam, expected = data["lam"], data["correlation"][correlation]
    uploads_mP = float64(data["M_mP"])
    weights_Sm = torch.cat([torch.full((1, 4), 0.25, dtype=torch.float64), float64(expected["Wr_Km"])])
    bank_SP = fuse_(float64(data["E_SP"]), uploads_mP, lam * weights_Sm, torch.full((4,), 1 - lam).double())
    torch.testing.assert_close(bank_SP, float64(expected["E_after_SP"]), atol=1e-7, rtol=0)
    keep_S = torch.full((4,), 1 - lam, dtype=torch.float64)
    bank_SP = fuse_(float64(data["E_SP"]), uploads_mP, lam * weights_Sm, keep_S)
    torch.testing.assert_close(bank_SP, float64(expected["E_after_SP"]), atol=1e-10, rtol=0)


def test_collapsed_updates_match_the_worked_example():
    data = load("fedmoe_round")
    keep_K = torch.full((3,), 1 - data["lam"], dtype=torch.float64)
    weights_Km, collapsed_K = collapse(data["lam"] * float64(data["T_Wr_TKm"]), keep_K)
    routed_KP = fuse_(float64(data["E_SP"])[1:].clone(), float64(data["M_mP"]), weights_Km, collapsed_K)
    torch.testing.assert_close(routed_KP, float64(data["T_E_routed_after_KP"]), atol=1e-10, rtol=0)


def test_gemm_equals_the_written_out_double_loop_across_chunks():
    generator = torch.Generator().manual_seed(0)
    size = 140_003  # more than one chunk, and not a multiple of it
    bank_SP = torch.randn(4, size, generator=generator, dtype=torch.float64)
    uploads_mP = torch.randn(3, size, generator=generator, dtype=torch.float64)
    weights_Sm = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    keep_S = torch.tensor([0.0, 0.5, 1.0, 0.9], dtype=torch.float64)
    expected_SP = torch.zeros_like(bank_SP)
    for s in range(4):
        for p in range(0, size, 997):
            expected_SP[s, p] = keep_S[s] * bank_SP[s, p] + sum(weights_Sm[s, j] * uploads_mP[j, p] for j in range(3))
    fuse_(bank_SP, uploads_mP, weights_Sm, keep_S)
    torch.testing.assert_close(bank_SP[:, ::997], expected_SP[:, ::997], atol=1e-12, rtol=0)


def test_batchnorm_matches_the_worked_example():
    data = load("batchnorm")
    layout = StateLayout.of(nn.BatchNorm1d(4).double())
    rows_mP = torch.zeros(4, layout.size, dtype=torch.float64)
    for row_P, mean, variance in zip(rows_mP, data["running_mean_mF"], data["running_var_mF"], strict=True):
        views = layout.views(row_P)
        views["running_mean"].copy_(float64(mean))
        views["running_var"].copy_(float64(variance))
    bank_SP = torch.randn(1, layout.size, dtype=torch.float64)
    fuse_(bank_SP, rows_mP, float64([data["weights_m"]]), torch.zeros(1), layout.batchnorm)
    fused = layout.views(bank_SP[0])
    torch.testing.assert_close(fused["running_mean"], float64(data["fused_mean_F"]), atol=1e-10, rtol=0)
    torch.testing.assert_close(fused["running_var"], float64(data["fused_var_F"]), atol=1e-10, rtol=0)


def test_fused_batchnorm_statistics_are_those_of_the_pooled_data_and_plain_averages_are_not():
    generator = torch.Generator().manual_seed(1)
    groups = [shift + torch.randn(n, 3, generator=generator).double() for n, shift in ((50, -4.0), (150, 5.0))]
    layout = StateLayout.of(nn.BatchNorm1d(3).double())
    rows_mP = torch.zeros(2, layout.size, dtype=torch.float64)
    for row_P, group in zip(rows_mP, groups, strict=True):
        layout.views(row_P)["running_mean"].copy_(group.mean(0))
        layout.views(row_P)["running_var"].copy_(group.var(0, unbiased=False))
    pooled = torch.cat(groups)
    weights_Sm = torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    bank_SP = torch.zeros(1, layout.size, dtype=torch.float64)
    fuse_(bank_SP, rows_mP, weights_Sm, torch.zeros(1), layout.batchnorm)
    fused = layout.views(bank_SP[0])
    torch.testing.assert_close(fused["running_mean"], pooled.mean(0))
    torch.testing.assert_close(fused["running_var"], pooled.var(0, unbiased=False))
    plain = layout.views((weights_Sm @ rows_mP)[0])["running_var"]
    assert (plain < 0.2 * pooled.var(0, unbiased=False)).all()


def test_a_moving_average_keeps_its_own_part_in_the_batchnorm_mixture():
    layout = StateLayout.of(nn.BatchNorm1d(1).double())
    bank_SP = torch.zeros(1, layout.size, dtype=torch.float64)
    uploads_mP = torch.zeros(1, layout.size, dtype=torch.float64)
    for row_P, mean, variance in ((bank_SP[0], 2.0, 3.0), (uploads_mP[0], -1.0, 5.0)):
        layout.views(row_P)["running_mean"].fill_(mean)
        layout.views(row_P)["running_var"].fill_(variance)
    fuse_(bank_SP, uploads_mP, float64([[0.25]]), float64([0.75]), layout.batchnorm)
    fused = layout.views(bank_SP[0])
    assert fused["running_mean"].item() == pytest.approx(0.75 * 2 - 0.25)
    assert fused["running_var"].item() == pytest.approx(0.75 * (3 + 4) + 0.25 * (5 + 1) - 1.25**2)


def test_processes_that_hold_other_uploads_fuse_them_all(monkeypatch):
    monkeypatch.setitem(fusion._COLUMNS, "cpu", 7)
    layout = StateLayout.of(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double())
    bank_SP, rows_mP = torch.rand(6, layout.size, generator=torch.Generator().manual_seed(0)).double().split([2, 4])
    weights_Sm = float64([[0.1, 0.2, 0.3, 0.1], [0.0, 0.4, 0.1, 0.1]])
    keep_S = 1 - weights_Sm.sum(1)
    alone_SP = fuse_(bank_SP.clone(), rows_mP, weights_Sm, keep_S, layout.batchnorm)
    told = []
    fuse_(bank_SP.clone(), rows_mP[[1]], weights_Sm[:, [1]], keep_S, layout.batchnorm, lambda part: told.append(part))
    others = iter(told)
    fuse_(
        bank_SP, rows_mP[[0, 2, 3]], weights_Sm[:, [0, 2, 3]], keep_S, layout.batchnorm, lambda p: p.add_(next(others))
    )
    torch.testing.assert_close(bank_SP, alone_SP, atol=1e-12, rtol=0)
    assert next(others, None) is None


def test_rows_added_up_one_by_one_are_the_average_that_fusing_gives():
    layout = StateLayout.of(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double())
    rows_mP = torch.rand(3, layout.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fused_1P, sizes_m = torch.zeros(1, layout.size, dtype=torch.float64), torch.tensor([2.0, 5.0, 3.0])
    fuse_(fused_1P, rows_mP, sizes_m[None] / 10, torch.zeros(1), layout.batchnorm)
    sum_P = torch.zeros(layout.size, dtype=torch.float64)
    for row_P, size in zip(rows_mP.clone(), sizes_m.tolist(), strict=True):
        add_to_sum_(sum_P, row_P, size, layout.batchnorm)
    mean_of_sum_(sum_P, 10, layout.batchnorm)
    torch.testing.assert_close(sum_P, fused_1P[0], atol=1e-7, rtol=0)  # the weights of `fuse_` are in float32


def test_integer_buffers_are_taken_from_the_heaviest_upload():
    uploads = [{"steps": torch.tensor(3)}, {"steps": torch.tensor(8)}, {"steps": torch.tensor(5)}]
    taken = fuse_integers(uploads, torch.tensor([0.2, 0.3, 0.5]))["steps"]
    assert taken.item() == 5 and taken is not uploads[2]["steps"]


def test_rounding_brings_no_variance_below_zero():
    layout = StateLayout.of(nn.BatchNorm1d(64))
    rows_mP = torch.zeros(3, layout.size)
    for seed, row_P in enumerate(rows_mP):
        layout.views(row_P)["running_mean"].copy_(1000 * torch.rand(64, generator=torch.Generator().manual_seed(0)))
        layout.views(row_P)["running_mean"].add_(1e-3 * seed)
    mean, variance = layout.batchnorm[0]
    weights_m = torch.full((3,), 1 / 3)
    fused_1P, sum_P = torch.zeros(1, layout.size), torch.zeros(layout.size)
    fuse_(fused_1P, rows_mP, weights_m[None], torch.zeros(1), layout.batchnorm)
    for row_P in rows_mP.clone():
        add_to_sum_(sum_P, row_P, 1.0, layout.batchnorm)
    unclamped_F = (sum_P / 3)[variance.start : variance.stop] - (sum_P / 3)[mean.start : mean.stop].square()
    mean_of_sum_(sum_P, 3.0, layout.batchnorm)
    assert unclamped_F.min() < 0
    assert all(row_P[variance.start : variance.stop].min() >= 0 for row_P in (fused_1P[0], sum_P))
