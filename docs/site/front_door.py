"""The directive `front-door`: what a room of the package offers, as autodoc documents it."""

import inspect
from importlib import import_module
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import hf_fedmoe


def offered_names(room: str) -> list[str]:
    """Returns the full names of what a room offers: at the top of the package, or else by itself."""
    names = [f"hf_fedmoe.{name}" for name, of in hf_fedmoe._ROOMS.items() if of == room]
    return names or [f"hf_fedmoe.{room}.{name}" for name in import_module(f"hf_fedmoe.{room}").__all__]


def autodoc_lines(full_name: str) -> list[str]:
    """Returns the lines of reStructuredText that document a name."""
    module, _, name = full_name.rpartition(".")
    value = getattr(import_module(module), name)
    if inspect.isclass(value):
        return [f".. autoclass:: {full_name}", "   :members:", ""]
    return [f".. {'autofunction' if callable(value) else 'autodata'}:: {full_name}", ""]


class FrontDoor(SphinxDirective):
    """Documents the names of the room that it is given."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        lines = [line for name in offered_names(self.arguments[0]) for line in autodoc_lines(name)]
        return self.parse_text_to_nodes("\n".join(["```{eval-rst}", *lines, "```"]))


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("front-door", FrontDoor)
    return {"parallel_read_safe": True}
