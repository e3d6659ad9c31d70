"""Methods that need only sums, and those that can be private, follow from what they declare."""

from pathlib import Path

import pytest

from hf_fedmoe.experiments.named_strategies import STRATEGIES
from hf_fedmoe.federation import methods_of_sums, why_not_private, why_not_summed
from hf_fedmoe.strategies import FedAvg, FedMoE, FedMoESettings, Strategy


PAGE = Path(__file__).parents[2] / "docs" / "privacy.md"


def test_the_table_of_the_docs_is_what_methods_declare():
    assert methods_of_sums({"fedmoe": FedMoE, **STRATEGIES}) in PAGE.read_text()


def test_methods_that_look_at_single_uploads_are_known():
    private = {name for name, strategy in STRATEGIES.items() if why_not_private(strategy) is None}
    assert {"fedavg", "fedprox", "fedadam", "fedrep", "fedem"} <= private
    assert why_not_summed(STRATEGIES["scaffold"]) is None
    assert "`upload_tensors`" in why_not_private(STRATEGIES["scaffold"])
    assert "`links`" in why_not_private(STRATEGIES["decentralised"])
    for strategy in (FedMoE, FedMoE(FedMoESettings())):
        assert "runs each upload by itself, in the clear (`probe`)" in why_not_private(strategy)
    assert "`needs`" in why_not_private(STRATEGIES["qffl"])


@pytest.mark.parametrize(
    ("hook", "own"),
    [
        ("participants", lambda self, server, drawn, round_index: drawn[:1]),
        ("synchronise", lambda self, server, uploads: {}),
        ("probe", lambda self, server, row_P, reserved: None),
        ("update", lambda self, server, uploads, step: {}),
    ],
)
def test_a_hook_of_ones_own_is_a_reason(hook, own):
    assert why_not_private(FedAvg) is None
    own_method = type("OwnMethod", (FedAvg,), {hook: own, "needs": "rows" if hook == "update" else "mean"})
    assert why_not_private(own_method) is not None


def test_who_does_not_know_the_start_cannot_bound_updates():
    class Unknown(Strategy):
        needs = "mean"

        def download(self, server, client, kept_P):
            return server.bank_SP[0]

    assert "(`compressible`)" in why_not_private(Unknown)
    assert why_not_summed(Unknown) is None
