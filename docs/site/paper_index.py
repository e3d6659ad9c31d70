"""Writes the tables of docs/papers.md from docs/papers.yaml: `python docs/site/paper_index.py`."""

import re
from pathlib import Path
from typing import Any

import yaml


REPOSITORY = Path(__file__).parents[2]
BEGIN, END = "<!-- papers:begin -->", "<!-- papers:end -->"


def comparisons() -> dict[str, set[str]]:
    """Returns the names of the methods that each comparison of `recipes` has, by the path of its file."""
    found = {}
    for path in sorted((REPOSITORY / "recipes").rglob("*.yaml")):
        methods = yaml.safe_load(path.read_text()).get("methods", {}).values()
        names = {each if isinstance(each, str) else each["method"] for each in methods}
        if names:
            found[str(path.relative_to(REPOSITORY))] = names
    return found


def anchor(heading: str) -> str:
    """Returns the anchor that GitHub and the site give to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def table_row(entry: dict[str, Any]) -> str:
    """Returns the row of a paper's table or figure: what makes it, and where its figures are."""
    files = [f"[{name}](../recipes/paper/{name}.yaml)" for name in entry.get("files", [])]
    made_by = ", ".join(files) or f"`{entry['command']}`"
    figures = [f"[{heading}](results.md#{anchor(heading)})" for heading in entry.get("results", [])]
    if "page" in entry:
        figures = [f"[{entry['page'].partition('#')[0]}]({entry['page']})"]
    return f"| {entry['paper']} | {entry['shows']} | {made_by} | {'; '.join(figures) or 'not run'} |"


def method_row(name: str, paper: str, compared_in: list[str]) -> str:
    """Returns the row of a method: its paper, and the comparisons that have it."""
    links = [f"[{Path(path).stem}](../{path})" for path in compared_in]
    return f"| {paper} | `{name}` | {', '.join(links)} |"


def tables(index: dict[str, Any]) -> str:
    """Returns both tables as Markdown."""
    by_file = comparisons()
    methods = [
        method_row(name, paper, [path for path, names in by_file.items() if name in names])
        for name, paper in index["methods"].items()
    ]
    head = ["| paper | shows | made by | figures here |", "| --- | --- | --- | --- |"]
    head_of_methods = ["| paper | method | compared in |", "| --- | --- | --- |"]
    shown = ["## Tables and figures", "", *head, *map(table_row, index["tables"])]
    return "\n".join([*shown, "", "## Methods", "", *head_of_methods, *methods])


def page(text: str) -> str:
    """Returns the page with its tables written anew."""
    index = yaml.safe_load((REPOSITORY / "docs/papers.yaml").read_text())
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    return f"{text[:start]}\n\n{tables(index)}\n\n{text[end:]}"


if __name__ == "__main__":
    path = REPOSITORY / "docs/papers.md"
    path.write_text(page(path.read_text()))
