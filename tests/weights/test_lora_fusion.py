import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_fedmoe.weights.lora_fusion import (
    LoraFactors,
    fuse_lora_stack,
    fuse_lora_svd,
    in_basis_of,
)


VECTORS = Path(__file__).parents[1] / "data"
QUICK = settings(max_examples=25, deadline=None, derandomize=True)


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


def worked_example():
    data = json.loads((VECTORS / "lora.json").read_text())
    triples = zip(data["A"], data["B"], data["scaling"], strict=True)
    return data, [LoraFactors(float64(A), float64(B), scaling) for A, B, scaling in triples]


def random_adapters(ranks, seed=0, in_features=9, out_features=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    return [LoraFactors(normal(r, in_features), normal(out_features, r), 0.5 + n) for n, r in enumerate(ranks)]


def random_weights(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(adapter):
    return adapter.scaling * adapter.B_or @ adapter.A_ri


def dense_sums(adapters, weights_SJ):
    """One by one and written out, on purpose."""
    return [
        sum(weight * dense(adapter) for weight, adapter in zip(row, adapters, strict=True))
        for row in weights_SJ.tolist()
    ]


def truncated(delta_oi, rank):
    U, sigma, Vh = torch.linalg.svd(delta_oi, full_matrices=False)
    return U[:, :rank] * sigma[:rank] @ Vh[:rank], sigma[rank:].square().sum() / sigma.square().sum()


def assert_deltas(adapters, expected, atol=1e-10):
    torch.testing.assert_close([dense(adapter) for adapter in adapters], list(expected), atol=atol, rtol=0)


def test_stack_matches_the_worked_example():
    data, adapters = worked_example()
    fused = fuse_lora_stack(adapters, float64(data["weights_Km"]))
    assert_deltas(fused, float64(data["dense_delta_K"]))
    assert fused[0].A_ri.shape[0] == 1 + 2 + 3 + 2
    assert all(adapter.A_ri is fused[0].A_ri for adapter in fused)


def test_svd_matches_the_worked_example():
    data, adapters = worked_example()
    fused, discarded_K = fuse_lora_svd(adapters, float64(data["weights_Km"]), data["rank"])
    assert_deltas(fused, float64(data["best_rank_r_delta_K"]))
    torch.testing.assert_close(discarded_K, float64(data["discarded_energy_K"]), atol=1e-10, rtol=0)


@QUICK
@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    in_features=st.integers(1, 9),
    out_features=st.integers(1, 9),
    rank=st.integers(1, 12),
    seed=st.integers(0, 2**31),
)
def test_svd_is_the_truncated_svd_of_the_dense_sum_for_unequal_ranks(ranks, in_features, out_features, rank, seed):
    adapters = random_adapters(ranks, seed, in_features, out_features)
    weights_SJ = random_weights(3, len(ranks), seed=seed)
    weights_SJ[1, 0] = 0
    sums = dense_sums(adapters, weights_SJ)
    assert_deltas(fuse_lora_stack(adapters, weights_SJ), sums)
    fused, discarded_S = fuse_lora_svd(adapters, weights_SJ, rank)
    for adapter, discarded, delta_oi in zip(fused, discarded_S, sums, strict=True):
        assert adapter.A_ri.shape == (rank, in_features) and adapter.B_or.shape == (out_features, rank)
        if not delta_oi.any():
            assert discarded == 0 and not dense(adapter).any()
            continue
        best_oi, share = truncated(delta_oi, rank)
        torch.testing.assert_close(dense(adapter), best_oi, atol=1e-10, rtol=0)
        torch.testing.assert_close(discarded, share, atol=1e-10, rtol=0)


def test_svd_factors_are_balanced_and_their_prefix_is_the_best_of_a_smaller_rank():
    adapters = random_adapters([2, 4, 3])
    weights_SJ = random_weights(1, 3)
    [fused], _ = fuse_lora_svd(adapters, weights_SJ, 5, scaling=4.0)
    [delta_oi] = dense_sums(adapters, weights_SJ)
    sigma_r = torch.linalg.svdvals(delta_oi)[:5] / 4
    torch.testing.assert_close(fused.A_ri @ fused.A_ri.T, sigma_r.diag(), atol=1e-10, rtol=0)
    torch.testing.assert_close(fused.B_or.T @ fused.B_or, sigma_r.diag(), atol=1e-10, rtol=0)
    prefix = LoraFactors(fused.A_ri[:2], fused.B_or[:, :2], fused.scaling)
    assert_deltas([prefix], [truncated(delta_oi, 2)[0]])


def test_a_rank_above_that_of_the_sum_is_padded_with_zeros():
    adapters = random_adapters([1, 2])
    weights_SJ = float64([[0.5, -1.5], [0.0, 0.0]])
    fused, discarded_S = fuse_lora_svd(adapters, weights_SJ, 6)
    assert_deltas(fused, dense_sums(adapters, weights_SJ))
    assert not fused[0].A_ri[3:].any() and not fused[0].B_or[:, 3:].any()
    assert fused[0].A_ri[:3].any(1).all()
    assert not fused[1].A_ri.any() and fused[1].A_ri.shape == (6, 9)
    assert discarded_S.tolist() == [0, 0]


def test_two_opposite_uploads_cancel():
    [adapter] = random_adapters([2])
    weights_SJ = float64([[0.7, -0.7]])
    assert_deltas(fuse_lora_stack([adapter, adapter], weights_SJ), [torch.zeros(7, 9).double()])
    fused, _ = fuse_lora_svd([adapter, adapter], weights_SJ, 2)
    assert_deltas(fused, [torch.zeros(7, 9).double()])


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.bfloat16, 1e-5)])
def test_shorter_types_are_computed_in_float32(dtype, atol):
    adapters = random_adapters([2, 3], dtype=dtype)
    exact = [LoraFactors(a.A_ri.double(), a.B_or.double(), a.scaling) for a in adapters]
    weights_SJ = random_weights(2, 2)
    sums = dense_sums(exact, weights_SJ)
    stacked = fuse_lora_stack(adapters, weights_SJ)
    fused, discarded_S = fuse_lora_svd(adapters, weights_SJ, 3)
    assert {a.A_ri.dtype for a in stacked + fused} == {a.B_or.dtype for a in stacked + fused} == {torch.float32}
    assert_deltas(stacked, [delta_oi.float() for delta_oi in sums], atol)
    assert_deltas(fused, [truncated(delta_oi, 3)[0].float() for delta_oi in sums], atol)
    shares = torch.stack([truncated(delta_oi, 3)[1] for delta_oi in sums])
    torch.testing.assert_close(discarded_S, shares.float(), atol=atol, rtol=0)


def factors(seed=0, **features):
    """Random factors of rank 4 without a scaling."""
    [drawn] = random_adapters([4], seed, **features)
    return LoraFactors(drawn.A_ri, drawn.B_or)


def fused_in_basis(adapters, weights_J, old):
    """One sum of adapters, cut to the rank of `old` and in its basis."""
    [fused], _ = fuse_lora_svd(adapters, weights_J[None].to(old.A_ri), old.A_ri.shape[0])
    return in_basis_of(fused, old)


def assert_factors(found, A_ri, B_or, atol):
    torch.testing.assert_close((found.A_ri, found.B_or), (A_ri, B_or), atol=atol, rtol=0)


@QUICK
@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    in_features=st.integers(1, 9),
    out_features=st.integers(1, 9),
    dead=st.integers(0, 4),
    seed=st.integers(0, 2**31),
)
def test_in_any_basis_the_update_is_the_same(ranks, in_features, out_features, dead, seed):
    old, *adapters = random_adapters([4, *ranks], seed, in_features, out_features)
    old.A_ri[4 - dead :] = 0
    weights_SJ = random_weights(1, len(ranks), seed=seed)
    [fused], _ = fuse_lora_svd(adapters, weights_SJ, 4)
    found = in_basis_of(fused, old)
    assert_deltas([found], [dense(fused)], atol=1e-10 * max(1, dense(fused).abs().max()))
    assert found.A_ri.shape == old.A_ri.shape and found.B_or.shape == old.B_or.shape


@pytest.mark.parametrize("smallest", [1.0, 1e-3, 1e-6, 0.0])
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_the_same_update_again_has_the_same_factors(dtype, atol, smallest):
    """However small some of its directions are, and however unlike A and B."""
    drawn = factors(in_features=40, out_features=30)
    B_or = drawn.B_or * torch.tensor([1.0, smallest**0.5, smallest, smallest])
    for scale in (0.05, 50.0):
        old = LoraFactors((drawn.A_ri / 7).to(dtype), (B_or * scale).to(dtype))
        found = fused_in_basis([old] * 7, torch.arange(1.0, 8).double() / 28, old)
        assert torch.equal(found.A_ri, old.A_ri)
        size = scale * 3  # in float32 what is smaller than 1e-5 of the largest singular value may become 0
        torch.testing.assert_close(found.B_or, old.B_or, atol=size * (10 * atol), rtol=0)


def test_nothing_leaves_the_start_of_peft_as_it_is():
    drawn = factors()
    start = LoraFactors(drawn.A_ri, torch.zeros_like(drawn.B_or))
    found = fused_in_basis([start, start], float64([0.25, 0.75]), start)
    assert torch.equal(found.A_ri, start.A_ri) and not found.B_or.any()


def test_updates_in_the_old_row_space_change_b_alone():
    """So that where nobody trains A the factors are those of FFA-LoRA, from PEFT's start on."""
    drawn = factors()
    others = [factors(seed=5), factors(seed=6)]
    uploads = [LoraFactors(drawn.A_ri, other.B_or) for other in others]
    for old in (drawn, LoraFactors(drawn.A_ri, torch.zeros_like(drawn.B_or))):
        found = fused_in_basis(uploads, float64([0.25, 0.75]), old)
        assert_factors(found, drawn.A_ri, 0.25 * others[0].B_or + 0.75 * others[1].B_or, atol=1e-12)


def test_a_small_step_of_the_update_is_a_small_step_of_the_factors():
    old, step = factors(), factors(seed=3)
    moved = []
    for size in (1e-2, 1e-4, 1e-6):
        upload = LoraFactors(old.A_ri + size * step.A_ri, old.B_or + size * step.B_or)
        found = fused_in_basis([upload, old], float64([0.5, 0.5]), old)
        moved.append(max((found.A_ri - old.A_ri).abs().max(), (found.B_or - old.B_or).abs().max()).item() / size)
    assert moved[2] == pytest.approx(moved[1], rel=0.01) and max(moved) < 10


def test_directions_that_the_update_does_not_use_keep_the_old_a():
    old = factors()
    thin = LoraFactors(old.A_ri[:1], torch.ones(7, 1).double())
    found = fused_in_basis([thin], torch.ones(1), old)
    assert_deltas([found], [dense(thin)])
    assert_factors(found, old.A_ri, torch.ones(7, 1).double() @ torch.eye(4).double()[:1], atol=1e-12)


def test_where_the_old_a_has_nothing_the_new_factors_are_balanced():
    upload = factors()
    found = fused_in_basis(
        [upload], torch.ones(1), LoraFactors(torch.zeros(4, 9).double(), torch.zeros(7, 4).double())
    )
    torch.testing.assert_close(found.A_ri.norm(dim=1), found.B_or.norm(dim=0), atol=1e-10, rtol=0)
    assert_deltas([found], [dense(upload)])


def test_factors_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"A is \(3, 9\) and B is \(7, 2\), expected \[r, in_features\]"):
        LoraFactors(torch.zeros(3, 9), torch.zeros(7, 2))
    with pytest.raises(ValueError, match="with one r"):
        LoraFactors(torch.zeros(2, 9, 1, 1), torch.zeros(7, 2, 1, 1))
    with pytest.raises(ValueError, match="rank 0"):
        LoraFactors(torch.zeros(0, 9), torch.zeros(7, 0))
    with pytest.raises(ValueError, match="`scaling` is nan"):
        LoraFactors(torch.zeros(2, 9), torch.zeros(7, 2), float("nan"))
