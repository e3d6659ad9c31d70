"""The page of hyperparameters: its tables are those of the recipes."""

import runpy
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]


@pytest.fixture
def writer(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "site"))
    return runpy.run_path(str(ROOT / "docs" / "site" / "hyperparameter_tables.py"))


def test_the_page_has_the_settings_of_the_recipes(writer):
    text = (ROOT / "docs" / "hyperparameters.md").read_text()
    assert writer["page"](text) == text


def test_a_small_size_goes_before_the_rest_of_its_comparison(writer):
    settings = writer["personal_settings"]("pfedmm_cifar10")
    assert settings["FedAvg+"] == {"method": "fedavg_plus", "learning_rate": 0.03}
    assert settings["FedEM"] == {"method": "fedem", "learning_rate": 0.03}
    assert writer["personal_cell"](settings["pFedMe"]) == "0.01 (`penalty` 1, `outer_rate` 1)"


def test_the_figures_of_the_text_are_in_the_results():
    page, results = ((ROOT / "docs" / f"{name}.md").read_text() for name in ("hyperparameters", "results"))
    for figure in ("46.1 ± 5.8", "62.8 ± 3.0", "61.6 ± 2.2", "64.3", "64.6"):
        assert figure in page and figure in results
