"""Tells which methods can run with clients elsewhere, by the hooks that they have."""

from ..federation import Strategy, overrides
from ..strategies import FedMoE


def why_not(strategy: Strategy | type[Strategy]) -> str | None:
    """Says why a method cannot run with clients elsewhere, `None` if it can."""
    if overrides(strategy, "links"):
        return "its clients exchange models with one another (`links`), and nodes talk to the server only"
    if overrides(strategy, "synchronise") and overrides(strategy, "shared"):
        return (
            "the server changes rows that stay with clients and are not sent (`synchronise` beside `shared`), and "
            "does not have them"
        )
    return None


def methods_table(strategies: dict[str, type[Strategy]]) -> str:
    """
    Returns a Markdown table of methods, by their names: whether they can run with clients elsewhere, and what travels
    or stays besides what does of every method.
    """
    lines = ["| method | runs | besides the model |", "|---|---|---|"]
    every: dict[str, type[Strategy]] = {"fedmoe": FedMoE, **strategies}
    for name, strategy in sorted(every.items()):
        reason = why_not(strategy)
        runs, besides = ("yes", _besides(strategy)) if reason is None else ("no", reason)
        lines.append(f"| `{name}` | {runs} | {besides} |")
    return "\n".join(lines)


def _besides(strategy: type[Strategy]) -> str:
    found = []
    if overrides(strategy, "download_tensors") or overrides(strategy, "upload_tensors"):
        found.append("tensors of its own travel")
    if overrides(strategy, "shared"):
        found.append("a part of the model stays at the node")
    if overrides(strategy, "synchronise"):
        found.append("the server may keep a row for each client")
    return ", ".join(found)
