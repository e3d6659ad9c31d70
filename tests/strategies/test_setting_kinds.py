"""Numbers and switches of dataclasses are of the kind that they are annotated with."""

from dataclasses import dataclass

import numpy as np
import pytest

from hf_fedmoe.strategies import check_setting_kinds


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
