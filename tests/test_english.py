"""Docstrings say in the imperative, or in the third person, what a thing does; of a thing, what it is."""

import ast
from pathlib import Path

import hf_fedmoe


DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef
# With these a sentence begins that says neither.
RIDDLES = {"What", "Of", "Whose", "Who", "Where", "How", "Why", "Here", "Which", "Whether"}


def test_no_docstring_begins_with_a_riddle():
    found, count = [], 0
    for path in Path(hf_fedmoe.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, DOCUMENTED) and (docstring := ast.get_docstring(node)):
                count += 1
                if docstring.split()[0] in RIDDLES or docstring.startswith("The same"):
                    found.append(f"{path.name}:{getattr(node, 'lineno', 1)} {docstring.splitlines()[0]}")
    assert count > 500 and found == []
