"""The page of papers: its tables are those of its YAML, and what they name exists."""

import re
import runpy
from pathlib import Path

import yaml

from hf_fedmoe.experiments import method_names
from hf_fedmoe.strategies import Owners


ROOT = Path(__file__).parents[2]
INDEX = yaml.safe_load((ROOT / "docs" / "papers.yaml").read_text())
WRITER = runpy.run_path(str(ROOT / "docs" / "site" / "paper_index.py"))


def test_the_page_has_the_tables_of_the_yaml():
    text = (ROOT / "docs" / "papers.md").read_text()
    assert WRITER["page"](text) == text


def test_every_method_is_in_the_table_and_no_other():
    assert {*INDEX["methods"], *INDEX["without_paper"]} == {*method_names(), Owners.name}
    assert not INDEX["methods"].keys() & set(INDEX["without_paper"])


def test_every_comparison_of_a_paper_is_in_the_table_and_no_other():
    named = [name for table in INDEX["tables"] for name in table.get("files", [])]
    assert sorted(named) == sorted(path.stem for path in (ROOT / "recipes" / "paper").glob("*.yaml"))


def test_methods_are_found_in_the_comparisons():
    compared = WRITER["comparisons"]()
    assert compared["recipes/lora_fusions.yaml"] == {"fedavg", "fedavg_tuned_at_end", "fedmoe"}
    assert compared["recipes/paper/pfedmm_models.yaml"] == {"pfedmm"}


def test_figures_are_where_the_table_says():
    headings = re.findall(r"^#+ (.*)$", (ROOT / "docs" / "results.md").read_text(), re.MULTILINE)
    for table in INDEX["tables"]:
        assert set(table.get("results", [])) <= set(headings)
    assert WRITER["anchor"]("Reviews (shipped), a small GPT-2") == "reviews-shipped-a-small-gpt-2"
