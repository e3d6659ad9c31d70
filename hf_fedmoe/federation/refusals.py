"""Clients whose training failed or whose upload was refused, in words."""

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol


# As many clients of one reason are named; those beyond are counted.
MAX_NAMED = 10


class Participation(Protocol):
    """The participants of a round, and who of them was refused: a [`RoundReport`]."""

    clients: list[int]
    refused: dict[int, str]


def client_number(client: int) -> str:
    """Names a client that has no name."""
    return f"client {client}"


def never_accepted(rounds: Iterable[Participation]) -> dict[int, str]:
    """Returns the clients that took part in these rounds and were accepted in none, and why in the last of each."""
    refused: dict[int, str] = {}
    accepted: set[int] = set()
    for report in rounds:
        refused |= report.refused
        accepted |= set(report.clients) - set(report.refused)
    return {client: refused[client] for client in sorted(set(refused) - accepted)}


def reasons(refused: Mapping[int, str], client_name: Callable[[int], str]) -> str:
    """Says why clients were refused, in one line: those of one reason together, the reason of most clients first."""
    clients_by_reason: dict[str, list[int]] = {}
    for client, reason in refused.items():
        clients_by_reason.setdefault(reason, []).append(client)
    parts = []
    for reason, clients in sorted(clients_by_reason.items(), key=lambda item: -len(item[1])):
        named = ", ".join(client_name(client) for client in clients[:MAX_NAMED])
        more = f" and {len(clients) - MAX_NAMED} more" if len(clients) > MAX_NAMED else ""
        parts.append(f"{named}{more}: {reason}")
    return "; ".join(parts)
