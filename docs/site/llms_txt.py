"""The pages for language models: `llms.txt` names them (llmstxt.org), `llms-full.txt` has their whole text."""

import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment


def pages_in_order(env: BuildEnvironment) -> list[str]:
    """Returns the pages as the tables of contents have them, the first page first."""
    order = [env.config.root_doc]
    for page in order:
        order += [each for each in env.toctree_includes.get(page, []) if each not in order]
    return order


def first_sentence(text: str) -> str:
    """Returns the first sentence of a page's first paragraph, without marks of links and pictures."""
    body = re.sub(r"^---\n.*?^---\n", "", text, flags=re.DOTALL | re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n", body):
        if paragraph[:1].isalpha() or paragraph.startswith(("`", "**", "[")):
            plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(paragraph.split()))
            return re.split(r"(?<=[.:])\s(?=[A-Z`])", plain)[0].rstrip(":")
    return ""


def write(app: Sphinx, exception: Exception | None) -> None:
    """Writes both files beside the pages, when these could be made."""
    if exception is not None or app.builder.format != "html":
        return
    env = app.env
    texts = {page: Path(env.doc2path(page)).read_text() for page in pages_in_order(env)}
    links = [f"- [{env.titles[page].astext()}]({page}.html): {first_sentence(text)}" for page, text in texts.items()]
    title, summary = f"# {app.config.project}", f"> {first_sentence(texts[app.config.root_doc])}"
    Path(app.outdir, "llms.txt").write_text("\n\n".join([title, summary, "## Pages", "\n".join(links)]) + "\n")
    whole = [f"<!-- {page}.md -->\n\n{text.strip()}" for page, text in texts.items()]
    Path(app.outdir, "llms-full.txt").write_text("\n\n".join([title, *whole]) + "\n")


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("build-finished", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
