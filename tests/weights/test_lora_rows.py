import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.nn.functional import pad

from hf_fedmoe.models import AdapterExpert
from hf_fedmoe.models.adapters_fedmoe import peft_config_dict, with_adapters
from hf_fedmoe.weights import StateLayout, collapse, fit_rank_, fuse_models_, mix_rows, sizes_at_rank, widen_rank_
from tests.tiny_models import tiny_bert, tiny_gpt2


RANK, NUM_ROWS = 3, 5
NAMES = [f"adapter_{n}" for n in range(NUM_ROWS)]


def adapters(make=tiny_bert, seed=0, **config) -> list[AdapterExpert]:
    """Adapters of one base in float64, all with random factors."""
    torch.manual_seed(seed)
    config = peft_config_dict(LoraConfig(r=RANK, lora_alpha=2 * RANK, **config))
    peft_model = with_adapters(make(2), config, NAMES).double()
    experts = [AdapterExpert(peft_model, name) for name in NAMES]
    with torch.no_grad():
        for expert in experts:
            for parameter in expert.parameters():
                parameter.copy_(torch.randn_like(parameter))
    return experts


def bank_of(experts, lora_products=True):
    layout = StateLayout.of(experts[0], lora_products)
    return layout, layout.bank(experts)


def deltas(layout, row_P) -> list[torch.Tensor]:
    """B A of every adapter of a row, written out by name."""
    views = layout.views(row_P)
    found = []
    for name in views:
        if ".lora_A." in name:
            found.append(views[name.replace(".lora_A.", ".lora_B.")] @ views[name])
        elif ".lora_embedding_A" in name:
            found.append(views[name.replace("_embedding_A", "_embedding_B")] @ views[name])
    assert found
    return found


def others(layout, row_P) -> torch.Tensor:
    """Everything of a row that is no LoRA factor: the heads."""
    return torch.cat([view.flatten() for name, view in layout.views(row_P).items() if "lora_" not in name])


def truncated(delta, rank):
    U, sigma, Vh = torch.linalg.svd(delta, full_matrices=False)
    return U[:, :rank] * sigma[:rank] @ Vh[:rank], sigma.square()


WEIGHTS = torch.tensor([[0.2, 0.5, 0.0], [0.1, -0.3, 0.6]], dtype=torch.float64)
KEEP = torch.tensor([0.3, 0.0], dtype=torch.float64)


@pytest.mark.parametrize(
    "make, targets",
    [(tiny_bert, None), (tiny_bert, ["word_embeddings", "query", "dense"]), (tiny_gpt2, ["c_attn", "c_proj"])],
)
def test_fused_rows_are_the_truncated_svd_of_the_dense_sum_and_heads_the_weighted_sum(make, targets):
    layout, bank_NP = bank_of(adapters(make, target_modules=targets))
    server_SP, uploads_mP = bank_NP[:2].clone(), bank_NP[2:].clone()
    before_SP = server_SP.clone()
    lost_S = fuse_models_(server_SP, uploads_mP, WEIGHTS, KEEP, layout)
    for s in range(2):
        terms = [(KEEP[s], before_SP[s]), *zip(WEIGHTS[s], uploads_mP, strict=True)]
        sums = [sum(w * d for w, d in zip([t[0] for t in terms], layer, strict=True))
                for layer in zip(*(deltas(layout, row) for _, row in terms), strict=True)]  # fmt: skip
        energy = lost = 0.0
        for found, total in zip(deltas(layout, server_SP[s]), sums, strict=True):
            best, energy_r = truncated(total, RANK)
            torch.testing.assert_close(found, best, atol=1e-10, rtol=0)
            energy, lost = energy + energy_r.sum(), lost + energy_r[RANK:].sum()
        torch.testing.assert_close(lost_S[s], lost / energy, atol=1e-10, rtol=0)
        expected = sum(w * others(layout, row) for w, row in terms)
        torch.testing.assert_close(others(layout, server_SP[s]), expected, atol=1e-12, rtol=0)


def test_without_products_factors_are_averaged_each_by_itself():
    layout, bank_NP = bank_of(adapters(), lora_products=False)
    expected_P = WEIGHTS[0] @ bank_NP[2:] + KEEP[0] * bank_NP[0]
    server_SP = bank_NP[:1].clone()
    lost_S = fuse_models_(server_SP, bank_NP[2:], WEIGHTS[:1], KEEP[:1], layout)
    torch.testing.assert_close(server_SP[0], expected_P, atol=1e-12, rtol=0)
    assert lost_S.tolist() == [0.0] and layout.lora == ()


def test_with_a_common_frozen_a_both_stages_are_exact():
    experts = adapters()
    for expert in experts:
        for (name, parameter), common in zip(expert.named_parameters(), experts[0].parameters(), strict=True):
            if ".lora_A." in name:
                parameter.data.copy_(common)
                parameter.requires_grad_(False)
    layout, bank_NP = bank_of(experts)
    assert layout.lora == () and not any(".lora_A." in slot.name for slot in layout.slots)
    dense = [[p.detach().clone() for p in _dense(expert)] for expert in experts]
    # Stage B: the first two rows are experts; Stage C: a client takes its own row and both experts.
    fuse_models_(bank_NP[:2], bank_NP[2:].clone(), WEIGHTS, KEEP, layout)
    for s in range(2):
        expected = [sum(w * d for w, d in zip([KEEP[s], *WEIGHTS[s]], layer, strict=True))
                    for layer in zip(dense[s], *dense[2:], strict=True)]  # fmt: skip
        torch.testing.assert_close(_dense(experts[s]), expected, atol=1e-10, rtol=0)
    stage_b = [_dense(expert) for expert in experts[:2]]
    fuse_models_(
        bank_NP[2:3], bank_NP[:2].clone(), torch.tensor([[0.25, 0.45]], dtype=torch.float64), KEEP[:1], layout
    )
    expected = [0.3 * own + 0.25 * a + 0.45 * b for own, a, b in zip(dense[2], *stage_b, strict=True)]
    torch.testing.assert_close(_dense(experts[2]), expected, atol=1e-10, rtol=0)


def _dense(expert):
    found = {name: p.detach().clone() for name, p in expert.named_parameters()}
    return [found[name.replace(".lora_A.", ".lora_B.")] @ A for name, A in found.items() if ".lora_A." in name]


def test_t_steps_in_coefficients_are_t_dense_steps_cut_once():
    layout, bank_NP = bank_of(adapters())
    before_P, uploads_mP = bank_NP[0].clone(), bank_NP[2:]
    weights_TSm = torch.rand(4, 1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 0.2
    keep_S = torch.tensor([0.7], dtype=torch.float64)
    weights_Sm, kept_S = collapse(weights_TSm, keep_S)
    server_SP = before_P[None].clone()
    fuse_models_(server_SP, uploads_mP, weights_Sm, kept_S, layout)
    for layer, found in enumerate(deltas(layout, server_SP[0])):
        dense = deltas(layout, before_P)[layer]
        for weights_m in weights_TSm[:, 0]:
            terms = zip(weights_m, uploads_mP, strict=True)
            dense = 0.7 * dense + sum(weight * deltas(layout, row_P)[layer] for weight, row_P in terms)
        torch.testing.assert_close(found, truncated(dense, RANK)[0], atol=1e-10, rtol=0)


def test_a_single_row_keeps_its_product():
    layout, bank_NP = bank_of(adapters())
    [mixed_P] = mix_rows(bank_NP[:1], torch.ones(1, 1).double(), layout)
    torch.testing.assert_close(deltas(layout, mixed_P), deltas(layout, bank_NP[0]), atol=1e-10, rtol=0)


@pytest.mark.parametrize("rank", [1, 2])
def test_a_smaller_rank_starts_from_the_best_approximation_and_never_leaves_its_rank(rank):
    experts = adapters()
    layout, bank_NP = bank_of(experts)
    received_P = bank_NP[0].clone()
    fit_rank_(received_P, layout, rank, seed=3)
    for found, full in zip(deltas(layout, received_P), deltas(layout, bank_NP[0]), strict=True):
        torch.testing.assert_close(found, truncated(full, rank)[0], atol=1e-10, rtol=0)
    # A few steps of training, with momentum and weight decay: what is beyond the rank stays zero.
    bank_NP[1].copy_(received_P)
    optimizer = torch.optim.AdamW(experts[1].parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        experts[1](input_ids=torch.arange(12).view(2, 6) + 2).logits.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for found, start in zip(deltas(layout, bank_NP[1]), deltas(layout, received_P), strict=True):
        assert torch.linalg.matrix_rank(found) == rank and not torch.allclose(found, start)


def test_a_smaller_rank_starts_in_the_basis_of_the_first_directions():
    """So that a small step of the server's row is a small step of what a narrow client starts from."""
    layout, bank_NP = bank_of(adapters())
    steps = []
    for size in (0.0, 1e-3, 1e-6):
        row_P = bank_NP[0] + size * bank_NP[1]
        fit_rank_(row_P, layout, 2, seed=3)
        steps.append(row_P)
    assert (steps[1] - steps[0]).norm() < 1e-2 * bank_NP[1].norm()
    assert (steps[2] - steps[0]).norm() == pytest.approx(((steps[1] - steps[0]).norm() / 1e3).item(), rel=0.05)
    # PEFT's start of a smaller rank is the first part of that of the whole one.
    start_P = bank_NP[0].clone()
    for _, B in layout.lora:
        layout.views(start_P)[B.name].zero_()
    narrow_P = start_P.clone()
    fit_rank_(narrow_P, layout, 2, seed=3)
    for A, _ in layout.lora:
        assert torch.equal(layout.views(narrow_P)[A.name][:2], layout.views(start_P)[A.name][:2])
        assert not layout.views(narrow_P)[A.name][2:].any()


def test_what_a_narrow_client_sends_compares_with_the_servers_row():
    layout, bank_NP = bank_of(adapters())
    start_P = bank_NP[0]
    whole_P = start_P.clone()
    for _, B in layout.lora:  # a model that the rank of 2 holds whole
        layout.views(whole_P)[B.name][:, 2] = 0
    for row_P in (start_P, whole_P):
        upload_P = row_P.clone()
        fit_rank_(upload_P, layout, 2, seed=3)
        before = deltas(layout, upload_P)
        widen_rank_(upload_P, row_P, layout, 2)
        torch.testing.assert_close(deltas(layout, upload_P), before, atol=1e-10, rtol=0)
        left_out = sum((d - b).square().sum() for d, b in zip(deltas(layout, row_P), before, strict=True))
        moved = (upload_P - row_P).abs().max()
        assert moved < 1e-10 if left_out < 1e-10 else moved > 1e-3
    untouched_P = start_P.clone()
    widen_rank_(untouched_P, bank_NP[1], layout, RANK)
    assert torch.equal(untouched_P, start_P)


def test_rows_keep_their_basis():
    """Fused with themselves, and mixed in the basis of the first of them."""
    layout, bank_NP = bank_of(adapters())
    row_P = bank_NP[0]
    fused_SP = row_P[None].clone()
    fuse_models_(fused_SP, row_P.repeat(3, 1), torch.tensor([[0.1, 0.2, 0.4]], dtype=torch.float64), KEEP[:1], layout)
    torch.testing.assert_close(fused_SP[0], row_P, atol=1e-10, rtol=0)
    [mixed_P] = mix_rows(row_P.repeat(2, 1), torch.tensor([[0.75, 0.25]]).double(), layout)
    torch.testing.assert_close(mixed_P, row_P, atol=1e-10, rtol=0)
    # One client's upload is what the server has then, A and B as they were trained, but for a rotation.
    upload_P = row_P + 1e-4 * bank_NP[1]
    fuse_models_(fused_SP, upload_P[None], torch.ones(1, 1).double(), torch.zeros(1).double(), layout)
    for A, B in layout.lora:
        for name in (A.name, B.name):
            fused, sent = (layout.views(P)[name] for P in (fused_SP[0], upload_P))
            torch.testing.assert_close(fused, sent, atol=2e-3, rtol=0)
            assert fused.norm().item() == pytest.approx(sent.norm().item(), rel=1e-6) or name == B.name


def test_unused_directions_start_anew_without_changing_the_model():
    layout, bank_NP = bank_of(adapters())
    row_P = bank_NP[0].clone()
    for A, B in layout.lora:
        layout.views(row_P)[A.name][1:] = 0
        layout.views(row_P)[B.name][:, 1:] = 0
    before = deltas(layout, row_P)
    first_P, second_P = row_P.clone(), row_P.clone()
    fit_rank_(first_P, layout, None, seed=3)
    fit_rank_(second_P, layout, None, seed=4)
    torch.testing.assert_close(deltas(layout, first_P), before, atol=1e-12, rtol=0)
    for A, _ in layout.lora:
        A_ri, other_ri = layout.views(first_P)[A.name], layout.views(second_P)[A.name]
        assert (A_ri.abs().amax(1) > 0).all() and A_ri.abs()[1:].max() <= A.shape[1] ** -0.5
        assert torch.equal(A_ri[0], other_ri[0]) and not torch.allclose(A_ri[1:], other_ri[1:])


def test_sizes_at_rank_by_hand():
    layout, _ = bank_of(adapters())
    factors = [slot for pair in layout.lora for slot in pair]
    assert sizes_at_rank(layout, RANK) == {slot.name: slot.shape.numel() * 8 for slot in factors}
    assert sizes_at_rank(layout, 1) == {slot.name: slot.shape.numel() * 8 // 3 for slot in factors}
    assert sizes_at_rank(layout, RANK + 1) == sizes_at_rank(layout, RANK)


def test_the_worked_example_of_unequal_ranks_as_rows():
    def float64(values):
        return torch.tensor(values, dtype=torch.float64)

    data = json.loads((Path(__file__).parents[1] / "data" / "lora.json").read_text())
    clients = []
    for A, B, scaling in zip(data["A"], data["B"], data["scaling"], strict=True):
        layer = nn.ModuleDict({name: nn.Linear(1, 1, bias=False) for name in ("lora_A", "lora_B")})
        missing = RANK - len(A)
        layer["lora_A"].weight.data = pad(float64(A), (0, 0, 0, missing))
        layer["lora_B"].weight.data = pad(float64(B) * scaling, (0, missing))
        clients.append(nn.ModuleDict({"layer": layer}))
    layout = StateLayout.of(clients[0], lora_products=True)
    mixed_KP = mix_rows(layout.bank(clients), float64(data["weights_Km"]), layout)
    for row_P, expected in zip(mixed_KP, data["dense_delta_K"], strict=True):
        [found] = deltas(layout, row_P)
        torch.testing.assert_close(found, truncated(float64(expected), RANK)[0], atol=1e-10, rtol=0)
