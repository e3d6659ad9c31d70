"""Docstrings in Hugging Face's form, Markdown with `Args:` and ``name (`type`, *optional*)``, as reStructuredText."""

import re
import textwrap
from typing import Any

from transformers import TrainingArguments

import hf_fedmoe


SECTIONS = {
    "Args": "Arguments",
    "Attributes": "Attributes",
    "Returns": "Returns",
    "Raises": "Raises",
    "Warns": "Warns",
    "Example": "Example",
}
OF_ITEMS = {"Args", "Attributes", "Raises", "Warns"}
# In this order: a link, code, emphasis, and what reStructuredText would take for a mark.
MARKS = re.compile(
    r"\[`(?P<link>[^`]+)`\]|(?P<ticks>`+)(?P<code>.+?)(?P=ticks)|(?P<em>\*{1,2}\w[^*]*\*{1,2})|(?P<mark>[*|\\]|_\b)"
)


def link(name: str) -> str:
    """Writes [`Name`] as a link to what the package offers by that name, and as code if it is of another library."""
    parts = name.lstrip("~").split(".")
    shown = parts[-1] if name.startswith("~") else name
    for place, part in enumerate(parts):
        if part in hf_fedmoe._ROOMS:
            return f":py:obj:`{shown} <hf_fedmoe.{'.'.join(parts[place:])}>`"
    return f"``{shown}``"


def inline(text: str) -> str:
    """Writes a paragraph of Markdown as one of reStructuredText, in one line."""

    def convert(match: re.Match) -> str:
        if match["link"]:
            return link(match["link"]) + "\\ "
        if match["code"]:
            return f"``{match['code'].strip()}``\\ "
        return match["em"] or "\\" + match["mark"]

    converted = MARKS.sub(convert, " ".join(text.split()))
    # Marks want an end of their own only where a letter follows.
    return re.sub(r"\\ (?=[\s.,:;!?)\]}'\"/-]|$)", "", converted)


def paragraphs(text: str) -> list[str]:
    """Writes paragraphs, lists and fenced code."""
    lines: list[str] = []
    for part in re.split(r"(^```.*?^```$)", textwrap.dedent(text), flags=re.DOTALL | re.MULTILINE):
        if part.startswith("```"):
            code = part.split("\n", 1)[1].removesuffix("```")
            lines += [".. code-block:: python", "", *textwrap.indent(code, "   ").splitlines(), ""]
            continue
        for paragraph in re.split(r"\n\s*\n|\n(?=- )", part.strip("\n")):
            if paragraph.strip():
                bullet = "- " if paragraph.startswith("- ") else ""
                lines += [bullet + inline(paragraph.removeprefix("- ")), ""]
    return lines


def split_item(text: str) -> tuple[str, str]:
    """Splits ``name (`type`): meaning`` at the colon that is in no code and in no parentheses."""
    depth, code = 0, False
    for place, letter in enumerate(text):
        code ^= letter == "`"
        depth += not code and (letter in "([") - (letter in ")]")
        if letter == ":" and not code and not depth:
            return text[:place], text[place + 1 :]
    return text, ""


def item(text: str) -> list[str]:
    """Writes an argument, or an error, as an entry of a definition list."""
    head, meaning = split_item(text)
    names = re.match(r"[\w*]+(, [\w*]+)*(?= \(|$)", head)
    term = inline(head) if names is None else f"``{names[0]}`` {inline(head[names.end() :])}".rstrip()
    first, _, rest = meaning.lstrip(" ").partition("\n")
    meaning = "\n".join([first.strip(), textwrap.dedent(rest)]).strip()
    return [term, *textwrap.indent("\n".join(paragraphs(meaning) or ["\\ "]), "   ").splitlines(), ""]


def convert(docstring: str) -> list[str]:
    """Writes a whole docstring as lines of reStructuredText."""
    start, *sections = re.split(rf"^({'|'.join(SECTIONS)}):$", docstring, flags=re.MULTILINE)
    lines = paragraphs(start)
    for name, body in zip(sections[::2], sections[1::2], strict=True):
        lines += [f".. rubric:: {SECTIONS[name]}", ""]
        body = textwrap.dedent(body).strip("\n")
        if name in OF_ITEMS:
            for entry in re.split(r"\n(?=\S)", body):
                lines += item(entry)
        else:
            lines += paragraphs(body)
    return lines


def process_docstring(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    lines[:] = convert("\n".join(lines))


def process_signature(
    app: Any, what: str, name: str, value: Any, options: Any, arguments: str | None, returns: str | None
) -> tuple[str | None, str | None] | None:
    """Names the first of the arguments of a run only: there are a hundred and more."""
    if what == "class" and issubclass(value, TrainingArguments):
        return "(output_dir, **arguments)", returns
    return None


def setup(app: Any) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", process_docstring)
    app.connect("autodoc-process-signature", process_signature)
    return {"parallel_read_safe": True}
