"""Whether a reply goes round in circles: its end is one phrase, over and over."""

from collections.abc import Sequence

LONGEST = 128  # tokens of a phrase
TIMES = 4
LEAST = 64  # tokens that repeat, in all


def repeats(tokens: Sequence[int]) -> bool:
    """Whether `tokens` end in a phrase that was said `TIMES` times, and over `LEAST` tokens."""
    for period in range(1, min(LONGEST, len(tokens) // TIMES) + 1):
        span = max(TIMES * period, LEAST)
        tail = tokens[-span:]
        if len(tail) == span and tail[period:] == tail[:-period]:
            return True
    return False
