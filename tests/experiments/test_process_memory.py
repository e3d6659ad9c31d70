import sys

import pytest

from hf_fedmoe.experiments.process_memory import forget_peak, peak_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is one peak of a process")
def test_a_peak_is_forgotten_with_what_came_before():
    now = peak_bytes()
    assert 5e6 < now < 1e11  # of Python, in bytes
    block = bytearray(300_000_000)
    del block
    assert peak_bytes() >= 300_000_000
    high = peak_bytes()
    forget_peak()
    assert peak_bytes() < high - 200_000_000 or high < now + 100_000_000
