"""Numbers in sentences."""


def counted(number: int | str, noun: str) -> str:
    """Return a number with its noun: "1 call", "2 calls", "8 or 16 calls"."""
    return f"{number} {noun}" if str(number) == "1" else f"{number} {noun}s"
