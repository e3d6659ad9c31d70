"""Docstrings say in the imperative, or in the third person, what a thing does; of a thing, what it is."""

import ast
from pathlib import Path


REPOSITORY = Path(__file__).parents[1]
ROOTS = ("hf_fedmoe", "tests", "benchmarks", "recipes", "examples")
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef
# With these a sentence begins that says neither.
RIDDLES = {"What", "Of", "Whose", "Who", "Where", "How", "Why", "Here", "Which", "Whether", "With", "By"}
RIDDLING = ("The same", "As in", "That of", "Those of")


def test_no_docstring_begins_with_a_riddle():
    found, count = [], 0
    for path in (path for root in ROOTS for path in (REPOSITORY / root).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, DOCUMENTED) and (docstring := ast.get_docstring(node)):
                count += 1
                if docstring.split()[0] in RIDDLES or docstring.startswith(RIDDLING):
                    place = f"{path.relative_to(REPOSITORY)}:{getattr(node, 'lineno', 1)}"
                    found.append(f"{place} {docstring.splitlines()[0]}")
    assert count > 1000 and found == []
