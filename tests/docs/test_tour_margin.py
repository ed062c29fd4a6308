"""The tour's answers hold on every machine: no token of them is nearly as likely as another.

Sums in another order, or activations of 8 bits, move a logit by some hundredths, four windows of
calibration by some tenths. The answers are those of the original, so that is where it is looked at.
"""

import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from optim.runtime.engine.load import Model, load_model

TOUR = Path(__file__).parents[2] / "docs" / "tour.md"
MARGIN = 1.5  # nats


def answers() -> set[tuple[str, str]]:
    """Every prompt of the tour whose answer is written out, with the answer."""
    lines = TOUR.read_text(encoding="utf-8").splitlines()
    found = set()
    for command, shown in pairwise(lines):
        words = shlex.split(command) if command.startswith("$ optim run ") else []
        if len(words) > 4 and shown and not shown.startswith(("$", "`", "…", '"')):
            found.add((words[4], shown))
    return found


@pytest.fixture(scope="module")
def demo() -> Model:
    return load_model("demo", device="cpu", threads=1)


def test_the_tour_has_answers() -> None:
    assert answers()


@pytest.mark.parametrize(("prompt", "answer"), sorted(answers()))
def test_every_token_of_an_answer_is_far_likelier_than_the_next(
    demo: Model, prompt: str, answer: str
) -> None:
    asked = demo.tokenizer.chat([{"role": "user", "content": prompt}])
    said = demo.tokenizer.encode(answer)
    logits = demo.forward(torch.tensor([asked + said[:-1]]), demo.new_cache(), all_logits=True)
    best = logits[0, len(asked) - 1 :].log_softmax(-1).topk(2)
    assert best.indices[:, 0].tolist() == said
    assert float((best.values[:, 0] - best.values[:, 1]).min()) > MARGIN
