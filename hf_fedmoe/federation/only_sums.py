"""Tells which methods need no more of the uploads than sums, by what they declare: what can be hidden in a sum."""

from collections.abc import Mapping

from .contract import Strategy, overrides


def why_not_summed(strategy: Strategy | type[Strategy]) -> str | None:
    """Says why the server of a method needs more of the uploads than their sums, `None` if it does not."""
    if overrides(strategy, "links"):
        return "its clients exchange models with one another (`links`)"
    if overrides(strategy, "probe"):
        return "the server runs each upload by itself, in the clear (`probe`)"
    if strategy.needs != "mean":
        return "the server does more with uploads than add them up (`needs`)"
    return None


def why_not_private(strategy: Strategy | type[Strategy]) -> str | None:
    """Says why a method cannot have a mean with noise in the place of that of the uploads, `None` if it can."""
    if reason := why_not_summed(strategy):
        return reason
    for hook, reason in {
        "upload_tensors": "its clients send tensors beside their models, which no norm bounds",
        "participants": "it chooses itself who takes part, and the accounting is that of the draw",
        "synchronise": "the server leaves rows with the participants",
    }.items():
        if overrides(strategy, hook):
            return f"{reason} (`{hook}`)"
    if not strategy.compressible:
        return "the server does not know which model an update is the change of (`compressible`)"
    return None


def methods_of_sums(strategies: Mapping[str, type[Strategy]]) -> str:
    """
    Returns a Markdown table of methods, by their names: whether their server needs only sums, whether clients can be
    differentially private, why not, and whether their examples can.
    """
    lines = ["| method | needs only sums | client-level privacy | why not | example-level privacy |"]
    lines.append("|---|---|---|---|---|")
    for name, strategy in sorted(strategies.items()):
        summed, private = why_not_summed(strategy) is None, why_not_private(strategy)
        trained = not overrides(strategy, "train_client") and not overrides(strategy, "loss")
        *words, of_examples = ["yes" if holds else "no" for holds in (summed, private is None, trained)]
        lines.append(f"| `{name}` | {' | '.join(words)} | {private or ''} | {of_examples} |")
    return "\n".join(lines)
