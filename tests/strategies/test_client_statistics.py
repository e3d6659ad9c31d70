"""Statistics of clients' data: sums, and the likelihoods that they tell."""

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal

from hf_fedmoe.strategies.client_statistics import (
    ClientStatistics,
    client_statistics,
    head_features,
    head_of,
    prototype_scores,
)
from hf_fedmoe.training import FederatedTrainer
from tests.clients_of_groups import C, D, SCALES_d, clients_of_groups, means_of_groups
from tests.tiny_federation import tiny_args, tiny_decoder, tiny_expert, tiny_federation


def rows(seed: int, count: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, D, generator=generator), torch.randint(C, (count,), generator=generator)


def assert_equal(first: ClientStatistics, second: ClientStatistics) -> None:
    for mine, theirs in zip(vars(first).values(), vars(second).values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_by_hand():
    features_Nd = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 0.0]])
    found = ClientStatistics.of(features_Nd, torch.tensor([0, 2, 0]), 3)
    assert found.count_C.tolist() == [2, 0, 1]
    assert found.sum_Cd.tolist() == [[6, 2], [0, 0], [3, 4]]
    assert found.gram_dd.tolist() == [[35, 14], [14, 20]]
    # Around the means (3, 1) of class 0 and (3, 4) of class 2.
    expected_dd = torch.tensor([[8, -4], [-4, 2]], dtype=torch.float64) / 3
    torch.testing.assert_close(found.within_covariance(), expected_dd)


def test_sums_over_clients_are_those_of_the_pooled_rows_and_can_be_taken_out_again():
    clients = [rows(seed) for seed in range(4)]
    own = [ClientStatistics.of(*client, C) for client in clients]
    pooled = ClientStatistics.of(*(torch.cat(parts) for parts in zip(*clients, strict=True)), C)
    assert_equal(own[0] + own[1] + own[2] + own[3], pooled)
    without = ClientStatistics.of(*(torch.cat(parts) for parts in zip(*clients[:3], strict=True)), C)
    assert_equal(pooled - own[3], without)


def test_prototypes_are_the_likelihoods_of_normal_distributions():
    clients = clients_of_groups(list(range(4)), means_of_groups(4, 0.7), [[0, 2]] * 4)
    count_KC, sum_KCd = (torch.stack([getattr(client, name) for client in clients]) for name in ("count_C", "sum_Cd"))
    gram_dd = sum(client.gram_dd for client in clients)
    weights_Nd, bias_N = prototype_scores(count_KC, sum_KCd, gram_dd)
    count_N, sum_Nd = count_KC.flatten(), sum_KCd.flatten(0, 1)
    within_dd = ClientStatistics(count_N, sum_Nd, gram_dd).within_covariance()
    within_dd += (1e-3 * within_dd.diagonal() + 1e-9 * within_dd.diagonal().max()).diag()
    features_Nd = torch.randn(7, D, generator=torch.Generator().manual_seed(5)).double() * SCALES_d
    found_BN = (features_Nd @ weights_Nd.T + bias_N).log_softmax(1)
    there = count_N > 0
    normal = MultivariateNormal(sum_Nd[there] / count_N[there, None], within_dd)
    expected_BN = (normal.log_prob(features_Nd[:, None]) + (count_N[there] / count_N.sum()).log()).log_softmax(1)
    torch.testing.assert_close(found_BN[:, there], expected_BN, rtol=0, atol=1e-9)
    # Class 1 is in no group.
    assert (~there).sum() == 4 and (found_BN[:, ~there] < -5000).all()


@pytest.mark.parametrize("make", [tiny_expert, tiny_decoder])
def test_features_of_texts_are_what_their_head_decides_by(tmp_path, make):
    local = FederatedTrainer(make(), tiny_args(tmp_path), tiny_federation())._federation().local_trainer
    model = local.worker.eval()
    head = head_of(model)
    long = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]]), "attention_mask": torch.ones(2, 3, dtype=torch.int64)}
    long["labels"] = torch.tensor([0, 1])
    found = head_features(model, head, long, 64)
    assert found.shape == (2, model.config.hidden_size) and not torch.allclose(found[0], found[1])
    torch.testing.assert_close(head_features(model, head, {n: t[:1] for n, t in long.items()}, 64), found[:1])
    padded = {n: nn.functional.pad(t, (0, 2)) if t.dim() == 2 else t for n, t in long.items()}
    padded["input_ids"][:, 3:] = model.config.pad_token_id
    torch.testing.assert_close(head_features(model, head, padded, 64), found)
    torch.testing.assert_close(model(**long).logits, head(found))
    small = head_features(model, head, long, 4)
    assert small.shape == (2, 4) and (small.norm(dim=1) <= found.norm(dim=1)).all()
    assert torch.equal(small, head_features(model, head, long, 4))


def test_those_of_a_client_are_of_all_its_rows(tmp_path):
    trainer = FederatedTrainer(tiny_expert(), tiny_args(tmp_path), tiny_federation())
    federation = trainer._federation()
    local, data = federation.local_trainer, federation.participants.client_data(0)
    found = client_statistics(local, data, seed=0, size=8)
    labels = [row["label"] for row in trainer.federated_dataset.client(0)]
    assert found.count_C.tolist() == [labels.count(c) for c in range(3)]
    batch = trainer.data_collator([data[place] for place in range(len(data))])
    features_Nd = head_features(local.worker, head_of(local.worker), batch, 8)
    member_NC = nn.functional.one_hot(torch.tensor(labels), 3).double()
    torch.testing.assert_close(found.sum_Cd, member_NC.T @ features_Nd.double(), rtol=1e-5, atol=1e-5)
