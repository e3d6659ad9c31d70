"""Times and sizes in words."""


def time_in_words(seconds: float) -> str:
    """Says how long something takes, in two digits or so: `0.4 s`, `35 s`, `1.8 minutes`, `3.5 hours`."""
    for number, unit in ((seconds, "s"), (seconds / 60, "minutes"), (seconds / 3600, "hours")):
        if number < 99.5:
            return _in_two_digits(number, unit)
    return _in_two_digits(seconds / 86400, "days")


def size_in_words(count: int) -> str:
    """Says how many bytes something has, in two digits or so: `4.2 kB`, `85 MB`, `1.4 GB`."""
    for number, unit in ((count / 1e3, "kB"), (count / 1e6, "MB")):
        if number < 999.5:
            return _in_two_digits(number, unit)
    return _in_two_digits(count / 1e9, "GB")


def _in_two_digits(number: float, unit: str) -> str:
    return f"{number:.1f} {unit}" if number < 9.95 else f"{number:.0f} {unit}"
