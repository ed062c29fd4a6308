"""What guessing ahead gains: the same prompts answered with and without, in turns.

CPU seconds of one thread, the reading of the prompt left out: what else runs on the machine slows
all of them alike.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from optim.runtime.engine.load import Model
from optim.runtime.engine.sampling import Sampling
from optim.runtime.engine.session import Session

NOTE = (
    "The meeting is on Tuesday at ten in room 214. Anna brings the figures for March, Paul the plan"
    " for the new building. Everyone reads the report on the bridge before the meeting. Questions"
    " about the budget go to Maria Keller, questions about the building to Paul."
)
CODE = (
    "def total(prices, rate):\n    result = 0\n    for price in prices:\n        result += price\n"
    "    return result * (1 + rate)\n"
)
PROMPTS = {
    "chat": [
        "What is the capital of France?",
        "Why is the sky blue?",
        "Give me three tips for a good night's sleep.",
        "How do I boil an egg?",
        "Explain how a bicycle stays upright.",
        "What should I cook tonight?",
        "Who was Marie Curie?",
        "How do vaccines work?",
        "Write a short poem about autumn.",
        "What is the difference between a virus and a bacterium?",
        "How can I learn to swim?",
        "Tell me about the history of bread.",
    ],
    "rewrite": [
        f"Repeat this text exactly, word for word:\n\n{NOTE}",
        f"Correct any spelling mistake and write the whole text again:\n\n{NOTE}",
        f"Write the following text again, with Wednesday in place of Tuesday:\n\n{NOTE}",
    ],
    "summary": [
        f"Summarize this text:\n\n{NOTE}",
        f"List who does what in this text:\n\n{NOTE}",
    ],
    "edit": [
        f"Rename `prices` to `costs` and show the whole function:\n\n{CODE}",
        f"Add a docstring and show the whole function:\n\n{CODE}",
    ],
}
TEMPERATURES = (0.0, 0.7)
Told = Callable[[int, int, str], None]


@dataclass(slots=True)
class Spent:
    """What the replies of one kind took, and how their guesses fared."""

    seconds: float = 0.0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    texts: list[str] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


def speculation(
    model: Model, ways: dict[str, Any], new: int, rounds: int, told: Told
) -> Iterator[dict[str, Any]]:
    """A row a temperature and kind of prompt. `ways`: arguments of a Session, by name; the first
    is what the others are measured beside. `told` of each reply, as `ui.progress` is."""
    done, total = 0, len(TEMPERATURES) * rounds * sum(map(len, PROMPTS.values()))
    for temperature in TEMPERATURES:
        for kind, prompts in PROMPTS.items():
            spent = {name: Spent() for name in ways}
            for seed in range(rounds):
                for prompt in prompts:
                    told(done, total, f"{kind}, temperature {temperature:g}")
                    done += 1
                    sampling = Sampling(temperature, seed=seed, max_tokens=new)
                    for name, how in ways.items():
                        _answer(Session(model, sampling=sampling, **how), prompt, spent[name])
            yield _row(kind, temperature, spent)


def _answer(session: Session, prompt: str, spent: Spent) -> None:
    pieces = session.reply(prompt)
    first = next(pieces, "")
    before, start = session.stats.new_tokens, time.process_time()
    text = first + "".join(pieces)
    stats = session.stats
    if stats.new_tokens > before:
        spent.seconds += time.process_time() - start
        spent.tokens += stats.new_tokens - before
    spent.drafted += stats.drafted_tokens
    spent.accepted += stats.accepted_tokens
    spent.texts.append(text)


def _row(kind: str, temperature: float, spent: dict[str, Spent]) -> dict[str, Any]:
    plain = next(iter(spent.values()))
    return {
        "prompts": kind,
        "temperature": temperature,
        "replies": len(plain.texts),
        "ways": {
            name: {
                "tokens_per_second": one.rate,
                "gain": one.rate / plain.rate,
                "accepted": one.accepted / one.drafted if one.drafted else None,
                "identical": sum(a == b for a, b in zip(one.texts, plain.texts, strict=True)),
            }
            for name, one in spent.items()
        },
    }
