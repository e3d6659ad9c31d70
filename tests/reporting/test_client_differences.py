"""In what clients differ: groups, proportions of classes, or nothing."""

from functools import partial

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from hf_fedmoe import diagnose
from hf_fedmoe.data import FederatedDataset, dirichlet, iid
from hf_fedmoe.reporting import client_differences
from hf_fedmoe.strategies.client_groups import groups_of, shifts, strays
from hf_fedmoe.strategies.client_statistics import ClientStatistics
from tests.clients_of_groups import in_common
from tests.strategies.test_fedmoe_groups import federation_of_groups, federation_of_other_inputs
from tests.tiny_federation import tiny_expert, tiny_rows, with_padding


def of(data):
    model = tiny_expert().train()
    before = torch.get_rng_state()
    found = diagnose(data, model, lambda rows: with_padding(list(rows)))
    assert model.training and torch.equal(torch.get_rng_state(), before)
    return found


def test_groups_to_whom_labels_mean_something_else():
    found = of(federation_of_groups())
    assert found.num_groups == 2 and len(set(found.groups[::2])) == len(set(found.groups[1::2])) == 1
    same_MM = np.equal.outer(found.groups, found.groups)
    assert found.shift_MM[~same_MM].min() > found.shift_MM[same_MM].max()
    assert "where like inputs mean other labels" in found.advice and abs(found.input_distance) < 0.1
    assert "Compare `fedmoe_groups` with 2 routed experts" in found.advice
    assert "| groups | 2 |" in str(found) and found.clearness > 0.5


def test_groups_whose_inputs_differ():
    found = of(federation_of_other_inputs())
    assert found.num_groups == 2 and "2 groups of clients, where inputs themselves differ" in found.advice
    assert f"| distance of inputs between groups | {found.input_distance:.2f} |" in str(found)
    assert found.input_distance > 1


def clearest(groups: list[int], rows: list[int], means_gCd: torch.Tensor, seed: int) -> list[int]:
    """Divides made-up clients of so many rows, whose features have variance 1 within classes."""
    generator = torch.Generator().manual_seed(seed)
    _, C, d = means_gCd.shape
    clients = []
    for group, count in zip(groups, rows, strict=True):
        labels_N = torch.randint(C, (count,), generator=generator)
        features_Nd = means_gCd[group][labels_N] + torch.randn(count, d, generator=generator)
        clients.append(ClientStatistics.of(features_Nd, labels_N, C))
    known = in_common(clients)
    divided = partial(groups_of, known)
    return client_differences._clearest_groups(shifts(known), strays(known), lambda count: divided(count).tolist())[0]


def test_groups_are_clear_of_many_features_and_with_a_client_of_few_rows():
    """Means that are 4 standard deviations apart, and more, were hidden by what chance is expected to do."""
    groups, means_gCd = [0, 1, 2, 3] * 3, 0.4 * torch.randn(4, 10, 64, generator=torch.Generator().manual_seed(0))
    for rows in ([50] * 12, [300] * 11 + [8]):
        assert adjusted_rand_score(groups, clearest(groups, rows, means_gCd, seed=1)) == 1


def test_of_clients_who_are_alike_chance_makes_no_groups():
    for num_clients in (4, 6, 8):
        found = [clearest([0] * num_clients, [30] * num_clients, torch.zeros(1, 2, 5), seed) for seed in range(25)]
        assert all(set(groups) == {0} for groups in found)


def test_clients_that_are_alike():
    rows = tiny_rows(300)
    found = of(FederatedDataset(rows, iid(300, 6)))
    assert found.num_groups == 1 and found.label_skew < 0.15 and found.advice.startswith("Clients look alike")
    assert "| shift of classes between groups | - |" in str(found)


def test_clients_of_other_proportions_are_no_groups():
    rows = tiny_rows(400)
    found = of(FederatedDataset(rows, dirichlet(rows["label"], 6, 0.3, seed=1, min_size=20)))
    counts = found.label_skew
    assert found.num_groups == 1 and counts > 0.25 and "one model for all is right" in found.advice


def test_of_clients_without_a_class_in_common_nothing_can_be_told():
    rows = tiny_rows(120)
    labels_N = np.array(rows["label"])
    clients = [half for label in range(3) for half in np.array_split(np.flatnonzero(labels_N == label), 2)]
    found = of(FederatedDataset(rows, clients))
    assert found.num_groups == 1 and found.comparable == pytest.approx(3 / 15)
    assert "only 20% of the pairs of clients have a class in common" in found.advice and "is right" not in found.advice


def test_of_many_rows_some_of_all_parts_are_looked_at(monkeypatch):
    """They may be sorted by class."""
    monkeypatch.setattr(client_differences, "MOST_ROWS", 70)
    rows = tiny_rows(200).sort("label")
    batches = list(client_differences._batches(rows, tiny_expert(), lambda rows: with_padding(list(rows))))
    assert [len(batch["labels"]) for batch in batches] == [64, 3]
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == rows["label"][::3]


def test_features_that_do_not_vary_are_refused():
    model = tiny_expert()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with pytest.raises(ValueError, match="Features of the model vary by 0 within classes"):
        diagnose(federation_of_groups(), model, lambda rows: with_padding(list(rows)))


@pytest.mark.parametrize(
    ("clients", "message"),
    [
        (
            lambda first: [[row] for row in first],
            "The 3 clients of `data` have too few rows, 3 together, and none",
        ),
        (
            lambda first: [first[:2], first[2:]],
            "The 2 clients .*, 3 together, and no class has two rows: .* 2 rows",
        ),
        (lambda first: [[row] for row in range(6)], "The 6 clients .*, 6 together, and none has more than one"),
    ],
)
def test_clients_of_too_few_rows_are_told_so(clients, message):
    rows = tiny_rows(60)
    first = np.unique(rows["label"], return_index=True)[1].tolist()
    with pytest.raises(ValueError, match=message):
        of(FederatedDataset(rows, clients(first)))


def test_of_few_clients_no_groups_can_be_told():
    found = of(FederatedDataset(tiny_rows(60), iid(60, 3)))
    assert found.num_groups == 1 and "cannot be told of fewer than 4 clients" in found.advice
    with pytest.raises(ValueError, match=r"`data` has 1 client, which differs from nobody"):
        of(FederatedDataset(tiny_rows(60), iid(60, 1)))


def test_the_model_s_columns_are_chosen():
    data = federation_of_groups()
    wider = data.map(lambda row: {"kind": row["label"], "text": "words", "label_ids": 0})
    wider.label_column = "kind"
    assert np.array_equal(of(wider).shift_MM, of(data).shift_MM)
