import pytest

from hf_fedmoe.experiments.amounts import size_in_words, time_in_words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (99.4, "99 s"),
        (99.6, "1.7 minutes"),
        (12 * 60, "12 minutes"),
        (99.6 * 60, "1.7 hours"),
        (48 * 3600, "48 hours"),
        (99.6 * 3600, "4.2 days"),
        (30 * 86400, "30 days"),
    ],
)
def test_times_have_two_digits(seconds, words):
    assert time_in_words(seconds) == words


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0.0 kB"),
        (4200, "4.2 kB"),
        (999_400, "999 kB"),
        (999_600, "1.0 MB"),
        (85_300_000, "85 MB"),
        (1.42e9, "1.4 GB"),
        (142e9, "142 GB"),
    ],
)
def test_sizes_have_two_digits(count, words):
    assert size_in_words(count) == words
