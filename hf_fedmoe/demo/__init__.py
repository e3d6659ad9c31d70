"""A page that shows a mixture at work: what it answers, which experts it asked, and what changes without them."""

from .continuation import Continuation, continue_text
from .explanation import Explanation, explain
from .loading import ShownClassifier, ShownOwners, load_shown
from .page import page, serve
from .space import write_space


__all__ = [
    "Continuation",
    "Explanation",
    "ShownClassifier",
    "ShownOwners",
    "continue_text",
    "explain",
    "load_shown",
    "page",
    "serve",
    "write_space",
]
