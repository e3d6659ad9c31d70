"""A comparison as one HTML file."""

import base64
from html.parser import HTMLParser

from hf_fedmoe.reporting import RunResult, comparison_table, write_comparison_page


class Reader(HTMLParser):
    """Collects the cells of tables, and what is loaded from elsewhere."""

    def __init__(self):
        super().__init__()
        self.rows, self.sources, self.texts, self.is_cell = [], [], [], False

    def handle_starttag(self, tag, attributes):
        self.is_cell = tag in ("td", "th")
        if tag == "tr":
            self.rows.append([])
        if self.is_cell:
            self.rows[-1].append("")
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        self.is_cell = False

    def handle_data(self, data):
        if self.is_cell:
            self.rows[-1][-1] += data
        self.texts.append(data)


def test_table_pictures_and_words_are_in_one_file(tmp_path):
    results = {"a | <b>": [RunResult(0, {"accuracy": 0.5})], "c": [RunResult(0, {"accuracy": 0.25})]}
    (tmp_path / "curves.png").write_bytes(b"picture")
    text = comparison_table(results, ["accuracy"], reference="c") + "\n\nThese failed:\n\n- c, seed 1: 1 < 2"
    page = tmp_path / "comparison.html"
    write_comparison_page(page, "one & two", text, {"Learning curves": tmp_path / "curves.png"})
    reader = Reader()
    reader.feed(page.read_text())
    assert reader.rows == [["", "accuracy", "c above, of seeds"], ["a | <b>", "50.0", "0 / 1"], ["c", "25.0", ""]]
    assert reader.sources == ["data:image/png;base64," + base64.b64encode(b"picture").decode()]
    assert "one & two" in reader.texts and "- c, seed 1: 1 < 2" in reader.texts
