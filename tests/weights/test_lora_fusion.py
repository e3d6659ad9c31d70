import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_fedmoe.weights.lora_fusion import (
    LoraFactors,
    client_weights,
    fuse_lora_factors,
    fuse_lora_ffa,
    fuse_lora_stack,
    fuse_lora_svd,
    server_weights,
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


def test_factors_average_a_and_b_apart_which_is_not_the_sum_of_the_products():
    adapters = random_adapters([2, 2, 2])
    weights_SJ = float64([[0.2, 0.3, 0.5], [0.6, 0.4, 0.0]])
    fused = fuse_lora_factors(adapters, weights_SJ, scaling=2.0)
    for adapter, row in zip(fused, weights_SJ.tolist(), strict=True):
        A_ri = sum(weight * client.A_ri for weight, client in zip(row, adapters, strict=True))
        B_or = sum(weight * client.scaling * client.B_or for weight, client in zip(row, adapters, strict=True))
        torch.testing.assert_close(adapter.A_ri, A_ri)
        torch.testing.assert_close(dense(adapter), B_or @ A_ri)
    for adapter, delta_oi in zip(fused, dense_sums(adapters, weights_SJ), strict=True):
        assert (dense(adapter) - delta_oi).norm() > 0.15 * delta_oi.norm()
    [single] = fuse_lora_factors(adapters[1:2], float64([[1.0]]))
    assert_deltas([single], [dense(adapters[1])])


def test_ffa_is_exact_with_a_common_a_and_refuses_others():
    trained = random_adapters([3, 3, 3])
    adapters = [LoraFactors(trained[0].A_ri.clone(), a.B_or, a.scaling) for a in trained]
    weights_SJ = random_weights(2, 3)
    fused = fuse_lora_ffa(adapters, weights_SJ, scaling=0.25)
    assert_deltas(fused, dense_sums(adapters, weights_SJ))
    assert all(torch.equal(adapter.A_ri, trained[0].A_ri) for adapter in fused)
    with pytest.raises(ValueError, match=r"Adapter 1 has another A than adapter 0.*lora_fusion='svd'"):
        fuse_lora_ffa(trained, weights_SJ)


@pytest.mark.parametrize(
    "fuse", [fuse_lora_stack, fuse_lora_ffa, lambda *args: fuse_lora_svd(*args[:2], 2, args[2])[0]]
)
def test_a_result_of_any_scaling_is_the_same_update(fuse):
    adapters = [LoraFactors(random_adapters([2])[0].A_ri, a.B_or, a.scaling) for a in random_adapters([2, 2])]
    weights_SJ = random_weights(2, 2)
    assert_deltas(fuse(adapters, weights_SJ, 8.0), dense_sums(adapters, weights_SJ))
    assert all(adapter.scaling == 8.0 for adapter in fuse(adapters, weights_SJ, 8.0))


@pytest.mark.parametrize("num_iterations", [0, 1, 5])
def test_the_rounds_weights_equal_dense_steps_of_stages_b_and_c(num_iterations):
    experts, clients = random_adapters([4, 2, 3]), random_adapters([1, 3, 2, 2], seed=5)
    weights_TSm = random_weights(num_iterations, 3, 4).softmax(2)
    rate_S, rate = float64([1.0, 0.1, 0.4]), 0.3
    mixture_Sm = random_weights(3, 4, seed=2).softmax(0)

    dense_experts, dense_clients = [dense(e) for e in experts], [dense(c) for c in clients]
    for weights_Sm in weights_TSm:
        for s in range(3):
            news = sum(weights_Sm[s, j] * dense_clients[j] for j in range(4))
            dense_experts[s] = (1 - rate_S[s]) * dense_experts[s] + rate_S[s] * news
    dense_clients = [
        rate * dense_clients[j] + (1 - rate) * sum(mixture_Sm[s, j] * dense_experts[s] for s in range(3))
        for j in range(4)
    ]

    experts_SJ = server_weights(weights_TSm, rate_S)
    torch.testing.assert_close(experts_SJ.sum(1), torch.ones(3).double())
    new_experts = fuse_lora_stack(experts + clients, experts_SJ)
    assert_deltas(new_experts, dense_experts)
    clients_mJ = client_weights(mixture_Sm, rate, experts_SJ)
    assert_deltas(fuse_lora_stack(experts + clients, clients_mJ), dense_clients)
    # Stacks of stacks: the same clients from the new experts' own stacks, and from the recompressed ones.
    eye_SJ = torch.eye(3, 7, dtype=torch.float64)
    assert_deltas(fuse_lora_stack(new_experts + clients, client_weights(mixture_Sm, rate, eye_SJ)), dense_clients)
    full_rank, discarded_S = fuse_lora_svd(experts + clients, experts_SJ, 7)
    assert_deltas(fuse_lora_stack(full_rank + clients, client_weights(mixture_Sm, rate, eye_SJ)), dense_clients)
    assert discarded_S.max() < 1e-20


def test_ffa_is_closed_under_stages_b_and_c():
    common_A = random_adapters([2])[0].A_ri
    experts, clients = (
        [LoraFactors(common_A, a.B_or, a.scaling) for a in random_adapters([2] * 3, s)] for s in (3, 4)
    )
    experts_SJ = server_weights(random_weights(4, 3, 3).softmax(2), float64([0.5, 0.1, 1.0]))
    clients_mJ = client_weights(random_weights(3, 3).softmax(0), 0.2, experts_SJ)
    new_experts = fuse_lora_ffa(experts + clients, experts_SJ, scaling=2.0)
    new_clients = fuse_lora_ffa(experts + clients, clients_mJ, scaling=2.0)
    assert_deltas(new_experts + new_clients, dense_sums(experts + clients, torch.cat([experts_SJ, clients_mJ])))
    again = fuse_lora_ffa(new_experts + new_clients, random_weights(1, 6))
    assert_deltas(again, dense_sums(new_experts + new_clients, random_weights(1, 6)))


def test_factors_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"A is \(3, 9\) and B is \(7, 2\), expected \[r, in_features\]"):
        LoraFactors(torch.zeros(3, 9), torch.zeros(7, 2))
    with pytest.raises(ValueError, match="with one r"):
        LoraFactors(torch.zeros(2, 9, 1, 1), torch.zeros(7, 2, 1, 1))
    with pytest.raises(ValueError, match="rank 0"):
        LoraFactors(torch.zeros(0, 9), torch.zeros(7, 0))
    with pytest.raises(ValueError, match="`scaling` is nan"):
        LoraFactors(torch.zeros(2, 9), torch.zeros(7, 2), float("nan"))


@pytest.mark.parametrize("fuse", [fuse_lora_stack, fuse_lora_ffa, fuse_lora_factors])
def test_arguments_that_do_not_fit_are_refused(fuse):
    [adapter], [other_in] = random_adapters([2]), random_adapters([2], in_features=8)
    [other_out] = random_adapters([2], out_features=6)
    for other, features in ((other_in, r"\(8, 7\)"), (other_out, r"\(9, 6\)")):
        message = rf"Adapter 1 has \(in_features, out_features\) = {features}, adapter 0 has \(9, 7\)"
        with pytest.raises(ValueError, match=message):
            fuse([adapter, other], torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"`weights_SJ` is \(1, 3\) for 1 adapters"):
        fuse([adapter], torch.ones(1, 3))
    with pytest.raises(ValueError, match="at least one adapter"):
        fuse([], torch.ones(1, 0))
    with pytest.raises(ValueError, match=r"`scaling` is 0\.0"):
        fuse([adapter], torch.ones(1, 1), 0.0)


def test_ranks_and_weights_that_do_not_fit_are_refused():
    adapters = random_adapters([1, 2])
    with pytest.raises(ValueError, match="`rank` is 0"):
        fuse_lora_svd(adapters, torch.ones(1, 2), 0)
    with pytest.raises(ValueError, match=r"ranks \[1, 2\].*'svd'"):
        fuse_lora_factors(adapters, torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"`weights_TSm` is \(2, 3, 4\) and `rate_S` \(2,\)"):
        server_weights(torch.ones(2, 3, 4), torch.ones(2))
    with pytest.raises(ValueError, match=r"`experts_SJ` is \(2, 4\), expected \(2, 5\)"):
        client_weights(torch.ones(2, 3), 0.1, torch.ones(2, 4))
