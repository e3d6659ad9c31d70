"""Facts of experts beside a model."""

import json

import numpy as np
import pytest

from hf_fedmoe.models import FedMoEForSequenceClassification
from hf_fedmoe.reporting import ExpertFacts, RunFacts, read_expert_facts, write_expert_facts, write_model_card
from hf_fedmoe.reporting.expert_facts import FILE
from tests.tiny_models import tiny_bert


FACTS = ExpertFacts(["hill", "dale"], [[0.5, 0.5], [1.0, 0.0]], ["bad"], [[1.0]])


def test_a_card_leaves_what_it_says_of_the_experts(tmp_path):
    model = FedMoEForSequenceClassification.from_expert(tiny_bert(3), num_routed_experts=2)
    contribution_SM = np.array([[0.25, 0.75], [1.0, 0.0], [0.0, 1.0]])
    gate_share_KC = np.array([[0.25, np.nan, 0.5], [0.75, np.nan, 0.5]])
    run = RunFacts("fedmoe", {}, {}, 2, np.array([3, 4]), contribution_SM=contribution_SM, client_names=["a", "b"])
    write_model_card(tmp_path, model, run, gate_share_KC=gate_share_KC)
    labels = [model.config.id2label[0], model.config.id2label[2]]
    assert read_expert_facts(tmp_path / FILE, 3, 2) == ExpertFacts(
        ["a", "b"], contribution_SM.tolist(), labels, [[0.25, 0.5], [0.75, 0.5]]
    )
    write_model_card(tmp_path, model)  # of which nothing is known
    assert not (tmp_path / FILE).exists()


def test_what_fits_another_mixture_or_is_no_such_file_is_refused(tmp_path):
    write_expert_facts(tmp_path, FACTS)
    assert read_expert_facts(tmp_path / FILE, 2, 1) == FACTS
    with pytest.raises(ValueError, match="'contribution_SM' is no table of 3 rows and 2 columns"):
        read_expert_facts(tmp_path / FILE, 3, 1)
    for text in ("{", "[]", "{}", json.dumps({**vars(FACTS), "gate_share_KC": [["x"]]})):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(ValueError, match=r"'expert_facts.json' beside the model cannot be read: .*Write the card"):
            read_expert_facts(tmp_path / FILE, 2, 1)
