"""Counts and times of the server, in the text form that Prometheus reads."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

BOUNDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


@dataclass(slots=True)
class Histogram:
    """How many of the observed seconds lie below each of `BOUNDS`."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    total: float = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.total += seconds

    def lines(self, name: str) -> list[str]:
        below, lines = 0, [f"# TYPE {name} histogram"]
        for bound, count in zip((*map(str, BOUNDS), "+Inf"), self.counts, strict=True):
            below += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {below}')
        return [*lines, f"{name}_sum {self.total:.6f}", f"{name}_count {below}"]


@dataclass(slots=True)
class Metrics:
    """What has happened since the start."""

    requests: Counter[int] = field(default_factory=Counter)  # by HTTP status
    ended: Counter[str] = field(default_factory=Counter)  # texts, by why they ended
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    steps: int = 0
    first_token: Histogram = field(default_factory=Histogram)
    between_tokens: Histogram = field(default_factory=Histogram)
    step: Histogram = field(default_factory=Histogram)

    def text(self, gauges: dict[str, float]) -> str:
        """Everything, with `gauges` that are read now."""
        lines = ["# TYPE optim_requests_total counter"]
        lines += [
            f'optim_requests_total{{code="{c}"}} {n}' for c, n in sorted(self.requests.items())
        ]
        lines.append("# TYPE optim_texts_total counter")
        lines += [f'optim_texts_total{{reason="{r}"}} {n}' for r, n in sorted(self.ended.items())]
        counts = ("prompt_tokens", "cached_tokens", "new_tokens", "steps")
        for name in (*counts, "drafted_tokens", "accepted_tokens"):
            lines += [
                f"# TYPE optim_{name}_total counter",
                f"optim_{name}_total {getattr(self, name)}",
            ]
        for name, value in gauges.items():
            lines += [f"# TYPE optim_{name} gauge", f"optim_{name} {value:g}"]
        lines += self.first_token.lines("optim_first_token_seconds")
        lines += self.between_tokens.lines("optim_between_tokens_seconds")
        lines += self.step.lines("optim_step_seconds")
        return "\n".join(lines) + "\n"
