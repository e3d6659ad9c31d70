"""The site is built, without its notebooks' results; `make docs` executes them."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import hf_fedmoe


pytest.importorskip("myst_nb", reason="pip install -e '.[docs]'")
pytest.importorskip("furo", reason="pip install -e '.[docs]'")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


class Addresses(HTMLParser):
    """Collects what a page loads by itself, and the anchors that it has."""

    def __init__(self, page: str):
        super().__init__()
        self.loaded, self.anchors = [], set()
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors.add(given.get("id"))
        if tag in ("script", "img", "iframe", "source") and given.get("src"):
            self.loaded.append(given["src"])
        if tag == "link" and given.get("rel") in ("stylesheet", "preload", "preconnect", "icon"):
            self.loaded.append(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-c", "docs/site", "-d", str(out / "trees"), "-W", "--keep-going", "-q"]
    command += ["-D", "nb_execution_mode=off", ".", str(out / "html")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / "html"


def test_nothing_is_fetched_from_elsewhere(site):
    for path in site.rglob("*.html"):
        loaded = Addresses(path.read_text()).loaded
        assert not [each for each in loaded if re.match("(https?:)?//", each)], path
    for path in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()[\s\"']*(https?:)?//", path.read_text()), path


def test_every_name_of_the_front_door_is_in_the_reference(site):
    for name, room in hf_fedmoe._ROOMS.items():
        page = Addresses((site / "docs" / "reference" / f"{room}.html").read_text())
        assert f"hf_fedmoe.{name}" in page.anchors
    owners = Addresses((site / "docs" / "reference" / "owners.html").read_text())
    assert "hf_fedmoe.owners.train_expert" in owners.anchors


def test_names_in_docstrings_are_links(site):
    page = (site / "docs" / "reference" / "training.html").read_text()
    assert 'href="data.html#hf_fedmoe.FederatedDataset"' in page and "[`" not in page


def test_the_first_page_is_found(site):
    assert 'url=docs/index.html"' in (site / "index.html").read_text()


def test_language_models_find_every_page(site):
    listed = re.findall(r"^- \[.+?\]\((\S+?)\.html\): .", (site / "llms.txt").read_text(), re.MULTILINE)
    pages = {str(path.relative_to(ROOT).with_suffix("")) for path in (ROOT / "docs").rglob("*.md")}
    assert listed[:3] == ["docs/index", "README", "docs/own_data"] and pages <= set(listed)
    assert all((site / f"{page}.html").is_file() for page in listed)
    whole = (site / "llms-full.txt").read_text()
    assert all(f"<!-- {page}.md -->" in whole for page in listed)
