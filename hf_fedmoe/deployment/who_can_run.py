"""Which methods can run with clients elsewhere, by what their hooks say."""

from ..federation import Strategy


def overrides(strategy: Strategy, hook: str) -> bool:
    """Tells whether a method has a hook of its own."""
    return getattr(type(strategy), hook) is not getattr(Strategy, hook)


def why_not(strategy: Strategy) -> str | None:
    """Says why a method cannot run with clients elsewhere, `None` if it can."""
    if overrides(strategy, "links"):
        return "its clients exchange models with one another (`links`), and nodes talk to the server only"
    if overrides(strategy, "synchronise") and overrides(strategy, "shared"):
        return (
            "the server changes rows that stay with clients and are not sent (`synchronise` beside `shared`), and "
            "does not have them"
        )
    return None
