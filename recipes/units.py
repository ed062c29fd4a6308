"""Sizes, counts and durations as people read them."""

import re
from collections.abc import Sequence

from optim.recipes.errors import USAGE, OptimError


def size(nbytes: float) -> str:
    """Bytes in three figures: 490 MB, 1.40 GB."""
    return _scaled(nbytes, ("B", "kB", "MB", "GB", "TB"))


def parse_size(text: str, what: str) -> int:
    """`6GB`, `800 MB`, `4GiB` -> bytes; OptimError (2) for what is no size. `what` is the flag."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B\s*", text.upper())
    if found is None:
        raise OptimError(f"{what} {text}: must be a size", "like 6GB, 800MB or 4GiB", USAGE)
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit or " "))


def sizes_apart(*nbytes: float) -> tuple[str, ...]:
    """Sizes to be compared: in three figures, or to the byte where different ones look the same."""
    shown = tuple(map(size, nbytes))
    told_apart = len(set(shown)) == len(set(nbytes))
    return shown if told_apart else tuple(f"{value:,.0f} bytes" for value in nbytes)


def count(number: float) -> str:
    """A number of weights in three figures: 944 M, 2.69 B."""
    return _scaled(number, ("", "k", "M", "B", "T"))


def seconds(value: float) -> str:
    """A duration: 48s, 2m58s, 1h04m."""
    whole = round(value)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def _scaled(value: float, units: Sequence[str]) -> str:
    power = 0
    while value >= 999.5 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    digits = 0 if power == 0 or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {units[power]}".strip()
