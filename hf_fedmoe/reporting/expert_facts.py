"""
Facts of a mixture's experts beside the saved model, for pages that show it: the card has them as tables of Markdown.

Shape suffixes: S experts (main ones first), K routed experts, M clients, C classes.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path


FILE = "expert_facts.json"


@dataclass(frozen=True)
class ExpertFacts:
    """
    The sources of a mixture's experts, and the classes that they are chosen for.

    Args:
        clients (`list[str]`): Names of those that gave most, in the order of the run.
        contribution_SM (`list[list[float]]`): How much of each expert came from each of them; empty if not known.
        classes (`list[str]`): Those that had examples.
        gate_share_KC (`list[list[float]]`): Mean gate probability by routed expert and true class; empty if not known.
    """

    clients: list[str]
    contribution_SM: list[list[float]]
    classes: list[str]
    gate_share_KC: list[list[float]]


def write_expert_facts(folder: str | os.PathLike, facts: ExpertFacts) -> None:
    """Writes the facts into the folder of a model; where there are none, those of an earlier run go."""
    path = Path(folder) / FILE
    if facts.clients or facts.classes:
        path.write_text(json.dumps(asdict(facts), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    else:
        path.unlink(missing_ok=True)


def read_expert_facts(path: str | os.PathLike, num_experts: int, num_routed: int) -> ExpertFacts:
    """
    Reads what [`write_expert_facts`] wrote, a file that may be anybody's.

    Args:
        path (`str` or `os.PathLike`): The file.
        num_experts (`int`), num_routed (`int`): S and K of the mixture that it lies beside.

    Raises:
        ValueError: When it is no such file, or that of another mixture.
    """
    try:
        facts = ExpertFacts(**json.loads(Path(path).read_text(encoding="utf-8")))
        _check("contribution_SM", facts.contribution_SM, num_experts, len(facts.clients))
        _check("gate_share_KC", facts.gate_share_KC, num_routed, len(facts.classes))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{FILE!r} beside the model cannot be read: {error}. Write the card again.") from error
    return facts


def _check(name: str, rows: list[list[float]], height: int, width: int) -> None:
    """Raises `ValueError` unless the rows are a table of numbers of this size, or there is nothing."""
    right = isinstance(rows, list) and len(rows) == (height if width else 0)
    for row in rows if right else []:
        right &= isinstance(row, list) and len(row) == width and all(isinstance(value, (int, float)) for value in row)
    if not right:
        raise ValueError(f"{name!r} is no table of {height} rows and {width} columns")
