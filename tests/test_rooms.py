"""The rooms of the package: each imports only rooms below it, and no file imports itself by way of others."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import hf_fedmoe


PACKAGE = Path(hf_fedmoe.__file__).parent
# From the ground up (docs/architecture.md). A room is a folder, or a file at the top.
ROOMS = (
    "lazy_names",
    "model_folder",
    "models",
    "weights",
    "data",
    "federation",
    "strategies",
    "reporting",
    "demo",
    "owners",
    "training",
    "experiments",
    "deployment",
    "commands",
    "cli",
)
FILES = {
    ".".join(("hf_fedmoe", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imports_of(name: str, tree: ast.AST) -> set[str]:
    """Returns the files of the package that a file imports, in functions too."""
    found = set()
    package = name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from ..data import x` may name a file or what a room offers.
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in FILES else base for alias in node.names}
    return (found & FILES.keys()) - {name}


IMPORTS = {name: imports_of(name, ast.parse(path.read_text())) for name, path in FILES.items()}


def room_of(name: str) -> str:
    return name.split(".")[1] if "." in name else name


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_below_it(room):
    allowed = {"hf_fedmoe", *ROOMS[: ROOMS.index(room) + 1]}
    upwards = {
        f"{name} imports {imported}"
        for name, imports in IMPORTS.items()
        for imported in imports
        if room_of(name) == room and room_of(imported) not in allowed
    }
    assert upwards == set()


def test_every_file_is_in_a_room():
    assert {room_of(name) for name in FILES} - {"hf_fedmoe", "__main__"} == set(ROOMS)


def test_no_file_imports_itself_by_way_of_others():
    # What a room's front offers is imported by other rooms; its own files import one another directly.
    graph = {name: {each for each in imports if each != "hf_fedmoe"} for name, imports in IMPORTS.items()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_import_is_for_type_checkers_alone():
    assert [name for name, path in FILES.items() if "TYPE_CHECKING" in path.read_text()] == []
