"""The counts of Fed-MoE's Table 1."""

import runpy
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).parents[2]
TABLE1 = runpy.run_path(str(ROOT / "recipes" / "paper" / "table1.py"))


@pytest.mark.parametrize(
    ("name", "expert", "gate", "num_routed", "clients"),
    [
        ("FEMNIST", 6_603_710, 6_486_917, 5, 5),
        ("CIFAR-10", 11_173_962, 11_171_397, 5, 5),
        ("SENT-140", 109_483_778, 109_484_547, 3, 3),
        ("Yelp", 354_828_288, 124_442_112, 3, 3),
    ],
)
def test_mixtures_are_the_sum_of_their_parts(name, expert, gate, num_routed, clients):
    (setting,) = (setting for setting in TABLE1["SETTINGS"] if setting.name == name)
    with torch.device("meta"):
        assert setting.mixture_class.expert_auto_class.from_config(setting.gate).num_parameters() == gate
    fedmix, fedmoe = num_routed * expert + gate, (1 + num_routed) * expert + gate + 1
    assert TABLE1["counts"](setting) == {
        "FedAvg": (expert, clients * expert),
        "FedMix": (fedmix, clients * fedmix),
        "Fed-MoE": (fedmoe, clients * expert),
    }


def test_the_document_has_what_the_script_prints(capsys):
    TABLE1["main"]()
    assert capsys.readouterr().out in (ROOT / "docs" / "table1.md").read_text()
