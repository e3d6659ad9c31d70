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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 1.0}, "`count` is 1.0: give a whole number."),
        ({"count": None}, "`count` is None: give a whole number, or leave it out."),
        ({"rate": "0.5"}, "`rate` is '0.5': give a number."),
        ({"limit": float("nan")}, "`limit` is nan: give a number."),
        ({"switch": "false"}, "`switch` is 'false', a text: give True or False."),
    ],
)
def test_other_kinds_are_refused(changes, message):
    with pytest.raises(ValueError) as caught:
        check_setting_kinds(Settings(**changes))
    assert str(caught.value) == message


def test_what_python_and_numpy_count_with_is_taken():
    check_setting_kinds(Settings(count=np.int64(2), rate=1, limit=float("inf"), switch=True))
    check_setting_kinds(Settings(rate=np.float32(0.5), name=3))


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


def test_the_strategies_with_numbers_are_all_there():
    assert len({strategy for strategy, _ in NUMBERS}) >= 18 and len(NUMBERS) >= 40
