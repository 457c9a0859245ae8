"""Words that journal, messages and screens share."""


def plural(count: int, one: str, many: str = "") -> str:
    """`1 step`, `1,234 steps`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"
