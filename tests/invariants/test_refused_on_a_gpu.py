"""
Methods do nothing on tensors of a GPU that PyTorch refuses there with `full_determinism`: what adds up in any order,
as `torch.use_deterministic_algorithms` lists it. A CPU shows it too.
"""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_fedmoe.experiments.language_scores import log_likelihoods
from hf_fedmoe.strategies.fedem import model_losses
from hf_fedmoe.weights import StateLayout, by_entries, median, trimmed_mean
from tests import tiny_decoders
from tests.tiny_federation import tiny_ensemble, tiny_rows


REFUSED = {"cumsum", "nll_loss2d_forward", "median", "kthvalue", "histc", "put_"}


class Refused(TorchDispatchMode):
    """Collects the names of what would be refused of floating-point tensors in a block."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        if name in REFUSED and args[0].is_floating_point():
            self.names.add(name)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("rule", [median, trimmed_mean(0.2)], ids=["median", "trimmed_mean"])
def test_fusion_by_entries(rule):
    layout = StateLayout.of(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    bank_SP, uploads_mP = torch.rand(7, layout.size).split([2, 5])
    with Refused() as refused:
        by_entries(rule)(bank_SP, uploads_mP, torch.full((2, 5), 0.2), torch.zeros(2), layout)
    assert not refused.names


def test_losses_of_each_model_of_an_ensemble():
    rows = tiny_rows(6).with_format("torch")
    batch = {name: rows[name][:] for name in ("input_ids", "attention_mask")} | {"labels": rows["label"][:]}
    model = tiny_ensemble().eval()
    with Refused() as refused, torch.no_grad():
        losses_BM = model_losses(model, batch)
    assert not refused.names
    logits_BMC = model(**batch).model_logits
    expected_BM = nn.functional.cross_entropy(
        logits_BMC.transpose(1, 2), batch["labels"][:, None].expand(6, 2), reduction="none"
    )
    torch.testing.assert_close(losses_BM, expected_BM)


def test_scores_of_texts():
    model, batch = tiny_decoders.tiny_mixture("gpt2"), tiny_decoders.prompts()
    with Refused() as refused:
        log_likelihoods(model, batch["input_ids"], expert="press")
    assert not refused.names
    with Refused() as refused:
        model.route_by_likelihood(**batch)
    assert refused.names == {"cumsum"}  # which a GPU has done on the host: running_sums
