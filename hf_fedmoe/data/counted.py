"""Numbers of things in what is printed, `1 client` and `2 clients`."""


def counted(count: int, noun: str, nouns: str | None = None) -> str:
    """
    Says how many there are.

    Args:
        count (`int`): How many.
        noun (`str`): What one is called.
        nouns (`str`, *optional*, defaults to `noun` with an s): What several are called.
    """
    return f"{count} {noun if count == 1 else nouns or f'{noun}s'}"
