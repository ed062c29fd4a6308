"""Many prompts at once: groups of about equal length, padded on the left, decoded in step.

A decode step reads all weights whether it serves one text or eight. Pads are masked and positions
counted from each text's own start, so an answer is what the prompt alone would have got, up to the
rounding of sums: greedy answers can part where two tokens are as likely to the last digits.
"""

from collections.abc import Iterator, Sequence

import torch

from optim.runtime.cache.full import Policy
from optim.runtime.engine.load import Model
from optim.runtime.engine.sampling import Sampler
from optim.runtime.engine.sequence import Answer, Request, check
from optim.runtime.engine.stop_text import StopText


class _Row:
    """One text of a group, while it is written."""

    def __init__(self, model: Model, request: Request, context: int) -> None:
        self.history = list(request.ids)
        self.start = len(request.ids)
        # As alone: the last token needs no place in the cache.
        self.room = context - self.start + 1
        self.most = request.sampling.max_tokens or self.room
        self.sample = Sampler(request.sampling, model.device, self.start)
        self.ends = model.tokenizer.eos_ids
        self.letters, self.stops = model.tokenizer.stream(), StopText(request.sampling.stop)
        self.pieces: list[str] = []
        self.reason = ""
        self.exact = request.exact

    @property
    def count(self) -> int:
        return len(self.history) - self.start

    @property
    def budget(self) -> int:
        return min(self.most, self.room)

    def take(self, logits: torch.Tensor) -> int:
        """Draw the next token from `logits` `[V]`; any will do once the text has ended."""
        if self.reason:
            return self.history[-1]
        token = self.sample(logits, self.history)
        if token in self.ends:
            self.reason = "stop"
            return token
        self.history.append(token)
        self.pieces.append(self.stops.push(self.letters.push(token)))
        if self.stops.found:
            self.reason = "stop"
        elif self.count == self.room:
            self.reason = "context"
        elif self.count == self.most:
            self.reason = "length"
        return token

    def answer(self) -> Answer:
        if not self.stops.found:
            left = self.letters.flush(cut=self.reason != "stop" and not self.exact)
            self.pieces.append(self.stops.push(left))
            self.pieces.append(self.stops.flush())
        return Answer("".join(self.pieces), self.count, self.reason)


def answer_group(
    model: Model, requests: Sequence[Request], context: int, policy: Policy | None = None
) -> list[Answer]:
    """Answer `requests` together, each within a context of `context` tokens.

    Raises OptimError (2) for a prompt that is empty or does not fit.
    """
    for request in requests:
        check(request, model, context)
    rows = [_Row(model, request, context) for request in requests]
    longest = max(row.start for row in rows)
    padding = [longest - row.start for row in rows]
    ids = torch.tensor([[0] * p + row.history for p, row in zip(padding, rows, strict=True)])
    length = longest + max(row.budget for row in rows)
    pads = padding if any(padding) else None
    cache = model.new_cache(len(rows), length, padding=pads, policy=policy)
    while True:
        logits = model.forward(ids, cache)
        tokens = [row.take(line) for row, line in zip(rows, logits, strict=True)]
        if all(row.reason for row in rows):
            return [row.answer() for row in rows]
        ids = torch.tensor(tokens)[:, None]


def answer_all(
    model: Model,
    requests: Sequence[Request],
    *,
    context: int,
    size: int = 8,
    policy: Policy | None = None,
) -> Iterator[dict[int, Answer]]:
    """Answer all, at most `size` at once; yields the answers of each group by request number."""
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i].ids))
    for start in range(0, len(order), size):
        group = order[start : start + size]
        answers = answer_group(model, [requests[i] for i in group], context, policy)
        yield dict(zip(group, answers, strict=True))
