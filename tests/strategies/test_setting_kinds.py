"""Numbers and switches of dataclasses are of the kind that they are annotated with."""

import inspect
from dataclasses import MISSING, dataclass, fields
from typing import get_type_hints

import numpy as np
import pytest

from hf_fedmoe import strategies
from hf_fedmoe.strategies import Strategy, check_setting_kinds


@dataclass
class Settings:
    count: int = 1
    rate: float = 0.5
    limit: float | None = None
    switch: bool = False
    name: str = "a"
    shares: tuple[float, ...] = (1.0,)
    ranks: list[int] | None = None
    parts: tuple[str, ...] | None = None
    pair: tuple[int, str] = (1, "a")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 1.0}, "`count` is 1.0: give a whole number."),
        ({"count": None}, "`count` is None: give a whole number, or leave it out."),
        ({"rate": "0.5"}, "`rate` is '0.5': give a number."),
        ({"limit": float("nan")}, "`limit` is nan: give a number."),
        ({"switch": "false"}, "`switch` is 'false', a text: give True or False."),
        ({"shares": "0.5"}, "`shares` is '0.5': give a list of numbers."),
        ({"shares": 0.5}, "`shares` is 0.5: give a list of numbers."),
        ({"shares": None}, "`shares` is None: give a list of numbers, or leave it out."),
        ({"shares": (0.5, float("nan"))}, "`shares` is (0.5, nan): give a list of numbers."),
        ({"ranks": [4, 2.5]}, "`ranks` is [4, 2.5]: give a list of whole numbers."),
        ({"ranks": [True]}, "`ranks` is [True]: give a list of whole numbers."),
        ({"parts": "classifier"}, "`parts` is 'classifier': give a list of texts."),
        ({"parts": {"head": 1}}, "`parts` is {'head': 1}: give a list of texts."),
        ({"parts": ("a", None)}, "`parts` is ('a', None): give a list of texts."),
    ],
)
def test_other_kinds_are_refused(changes, message):
    with pytest.raises(ValueError) as caught:
        check_setting_kinds(Settings(**changes))
    assert str(caught.value) == message


def test_what_python_and_numpy_count_with_is_taken():
    check_setting_kinds(Settings(count=np.int64(2), rate=1, limit=float("inf"), switch=True))
    check_setting_kinds(Settings(rate=np.float32(0.5), name=3, pair="ab"))
    check_setting_kinds(Settings(shares=np.array([0.5]), ranks=range(3), parts=[""]))


NUMBERS = [
    (each, field.name)
    for each in vars(strategies).values()
    if inspect.isclass(each) and issubclass(each, Strategy) and "__dataclass_fields__" in vars(each)
    for field in fields(each)
    if field.init and field.default is not MISSING and get_type_hints(each)[field.name] in (int, float)
]


@pytest.mark.parametrize(
    ("strategy", "name"), NUMBERS, ids=lambda each: each if isinstance(each, str) else each.__name__
)
@pytest.mark.parametrize("value", ["1", None, True])
def test_every_strategy_says_which_of_its_numbers_is_none(strategy, name, value):
    others = {"client_models": []} if strategy.__name__ == "PFedMoE" else {}
    with pytest.raises(ValueError, match=f"^`{name}` is {value!r}: give a "):
        strategy(**others, **{name: value})


@pytest.mark.parametrize("value", ["1", True, 3.5, ["a"], (None,)])
@pytest.mark.parametrize("strategy", [strategies.FedRolex, strategies.HeteroFL])
def test_shares_are_numbers(strategy, value):
    with pytest.raises(ValueError, match=r"^`capacities` is .*: give a list of numbers"):
        strategy(capacities=value)


@pytest.mark.parametrize("value", ["small", 3.5, ["small"], (None,), {"hidden_size": 8}])
def test_own_models_are_configurations(value):
    with pytest.raises(ValueError, match=r"^`client_models` is .*: give a list of configurations of models"):
        strategies.PFedMoE(client_models=value)


def test_the_beginnings_of_names_are_no_single_text():
    with pytest.raises(ValueError, match=r"^`head` is 'classifier': give a list of texts"):
        strategies.FedRep(head="classifier")


def test_the_strategies_with_numbers_are_all_there():
    assert len({strategy for strategy, _ in NUMBERS}) >= 18 and len(NUMBERS) >= 40
