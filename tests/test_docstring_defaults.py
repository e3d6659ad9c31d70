"""Defaults that docstrings tell are those of the code."""

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from types import ModuleType

import pytest

import hf_fedmoe


# ``name (`type`, *optional*, defaults to `X`)``, where parentheses may stand in the type or in X.
TOLD = re.compile(r"^\s*(\w+) \((?:[^()\n]|\([^()]*\))*?defaults to `?((?:[^()`\n]|\([^()]*\))+?)`?\)", re.MULTILINE)
EXTRAS = {"flwr", "gradio", "dp_accounting", "deepspeed", "triton"}


def modules() -> Iterator[ModuleType]:
    for found in pkgutil.walk_packages(hf_fedmoe.__path__, "hf_fedmoe."):
        try:
            yield importlib.import_module(found.name)
        except ImportError as error:
            if (error.name or "").split(".")[0] not in EXTRAS:
                raise


def told_and_true(thing: object) -> Iterator[tuple[str, object, object]]:
    """Yields name, told default and true one of each argument whose default is told as a value."""
    found = TOLD.findall(inspect.cleandoc(thing.__doc__ or ""))
    if not found:
        return
    parameters = inspect.signature(thing).parameters  # type: ignore[arg-type]
    for name, text in found:
        try:
            told = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            continue  # in words, or of the model's configuration
        if name in parameters and not repr(parameters[name].default).startswith("<factory>"):
            yield name, told, parameters[name].default


def test_defaults_are_those_of_the_code():
    seen, wrong = 0, []
    for module in modules():
        for owner in vars(module).values():
            if getattr(owner, "__module__", None) != module.__name__ or not callable(owner):
                continue
            members = (
                [each for each in vars(owner).values() if inspect.isfunction(each)] if inspect.isclass(owner) else []
            )
            for thing in (owner, *members):
                for name, told, true in told_and_true(thing):
                    seen += 1
                    if told != true:
                        wrong.append(f"{thing.__qualname__}: {name} defaults to {true!r}, the docstring says {told!r}")
    assert not wrong and seen > 150


def test_the_test_can_tell():
    def draw(count: int = 3, shape: tuple[int, int] = (2, 2), rate: float | None = None) -> None:
        """
        Draws.

        Args:
            count (`int`, *optional*, defaults to 4): How many.
            shape (`tuple[int, int]`, *optional*, defaults to `(2, 2)`): Of each.
            rate (`float`, *optional*, defaults to `config.rate`): Of the draw.
        """

    assert list(told_and_true(draw)) == [("count", 4, 3), ("shape", (2, 2), (2, 2))]


@pytest.mark.parametrize("text", ["kind (`Literal['a', 'b']`, *optional*, defaults to `\"a\"`): One."])
def test_a_text_is_read_as_one(text):
    assert TOLD.findall(text) == [("kind", '"a"')]
