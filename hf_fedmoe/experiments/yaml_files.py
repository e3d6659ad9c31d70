"""YAML files as people write them by hand; what is wrong with one is said in one line."""

import re
from collections.abc import Hashable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """
    Reads scalars as YAML 1.2 does (`1e-3` is a number, `no` and `1:30` are texts), takes every name of a mapping as
    the text that was written, and refuses a name that stands twice.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                problem = "a name must be one word or number"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            if key.value in seen:
                problem = f"{key.value!r} stands twice: keep one of them"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}

    def construct_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        return int(text, 0) if re.match("0[ox]", text) else int(text)


for _tag, _pattern, _first in (
    ("merge", r"<<", "<"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int)


def read_yaml(path: Path) -> dict[str, Any]:
    """
    Reads a YAML file that holds a mapping.

    Raises:
        `ValueError`: When there is no such file, or it is none of UTF-8, YAML and a mapping; in one line.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        # By their names without endings, which make any two of them alike.
        beside = {file.stem: file for file in path.parent.glob("*.y*ml")} if path.parent.is_dir() else {}
        near = get_close_matches(path.stem, beside, n=1)
        remedy = f"is it {str(beside[near[0]])!r}?" if near else "check the path."
        raise ValueError(f"There is no file {str(path)!r}: {remedy}") from None
    except IsADirectoryError:
        raise ValueError(f"{str(path)!r} is a folder: name a YAML file.") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path.name}, line {line}: this is not UTF-8, save the file as UTF-8.") from None
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error.strerror}.") from error
    try:
        given = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        raise ValueError(_one_line(error, path.name, text)) from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name} is no YAML: {' '.join(str(error).split())}.") from None
    if given is None:
        raise ValueError(f"{path.name} is empty: write `name: value` lines.")
    if not isinstance(given, dict):
        raise ValueError(f"{path.name} holds a {type(given).__name__}: write `name: value` lines.")
    return given


def _one_line(error: yaml.MarkedYAMLError, file: str, text: str) -> str:
    mark = error.problem_mark or error.context_mark
    assert mark is not None  # a text is read, and all that is found in it has a place
    problem = error.problem or error.context
    if error.problem and error.context:
        begun = error.context_mark.line if error.context_mark else mark.line
        problem = f"{error.context} of line {begun + 1}, {error.problem}" if begun != mark.line else error.problem
    if problem == "mapping values are not allowed here":
        problem = "there is a ': ' too many: indent names alike, and put a text with ': ' into quotes"
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    if "\t" in line[: len(line) - len(line.lstrip())]:
        problem = "this begins with a tab: indent by spaces"
    return f"{file}, line {mark.line + 1}: {problem}."
