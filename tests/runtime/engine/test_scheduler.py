"""Texts that come, go and are cancelled at any step: each is written as if it were alone."""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from optim.recipes.errors import OptimError
from optim.runtime.cache.full import Policy
from optim.runtime.engine.load import Model, load_model
from optim.runtime.engine.sampling import Sampling
from optim.runtime.engine.scheduler import Scheduler
from optim.runtime.engine.sequence import Event, Request, Sequence
from optim.runtime.engine.slots import Slots
from tests.runtime.decoder.test_c_decode import SCHEMES, built, with_packed_linears

MakeModel = Callable[..., Path]
CONTEXT = 128
HEAD = [7 + i % 90 for i in range(70)]


@pytest.fixture(scope="module", params=["dense", "packed"])
def model(make_model: MakeModel, request: pytest.FixtureRequest) -> Model:
    """Packed: a prompt goes through a block, and steps through all, in one C call."""
    model = load_model(str(make_model("llama")), device="cpu", threads=1)
    if request.param == "packed":
        if not built():
            pytest.skip("no C compiler here")
        with_packed_linears(model, SCHEMES[0])
    return model


def text(model: Model, ids: list[int], seed: int | None = None, most: int = 12) -> Sequence:
    warm = {"temperature": 0.9, "top_p": 0.9, "seed": seed} if seed is not None else {}
    return Sequence(model, Request(ids, Sampling(max_tokens=most, **warm)), CONTEXT)


@pytest.fixture(autouse=True)
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pieces of a prompt, and a turn of one block."""
    monkeypatch.setattr(Model, "piece", 32)
    monkeypatch.setattr("optim.runtime.engine.scheduler.TURN", 0)


def scheduler(model: Model, count: int = 3, **more: object) -> Scheduler:
    return Scheduler(Slots(model, count, CONTEXT, **more))  # type: ignore[arg-type]


def finish(loop: Scheduler) -> list[Event]:
    events = []
    for _ in range(2000):
        if loop.idle:
            return events
        events += loop.step()
    raise AssertionError("it does not end")


def alone(model: Model, asked: Sequence, policy: Policy | None = None) -> list[int]:
    again = Sequence(model, asked.request, asked.context)
    loop = scheduler(model, 1, policy=policy)
    loop.submit(again)
    finish(loop)
    return again.history


def some_texts(model: Model, draw: random.Random) -> Iterator[Sequence]:
    for number in range(10):
        shared = HEAD[: draw.choice([0, 10, 32, 64, 70])]
        own = [draw.randrange(3, 260) for _ in range(draw.choice([1, 5, 33, 50]))]
        seed = draw.choice([None, number])
        yield text(model, shared + own, seed, draw.choice([1, 3, 8]))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("policy", [None, Policy(8), Policy(4)], ids=["16", "8", "4"])
def test_joins_leaves_and_cancels(model: Model, seed: int, policy: Policy | None) -> None:
    draw = random.Random(seed)
    loop = scheduler(model, draw.choice([1, 2, 4]), policy=policy)
    texts, left, events = list(some_texts(model, draw)), [], []
    for sequence in texts:
        loop.submit(sequence)
        for _ in range(draw.randrange(4)):
            events += loop.step()
        if draw.random() < 0.25:
            gone = draw.choice(texts)
            gone.cancelled = True
            left.append(gone)
    events += finish(loop)
    ended = [event for event in events if event.reason]
    assert {event.sequence for event in ended} == set(texts) and len(ended) == len(texts)
    for sequence in texts:
        whole = alone(model, sequence, policy)
        written = sequence.history
        assert written == whole[: len(written)]
        assert written == whole or sequence in left
    assert loop.slots.busy == 0 and loop.failures == []


def test_a_prefix_is_read_once(model: Model) -> None:
    loop = scheduler(model)
    for _ in range(2):
        loop.submit(text(model, [*HEAD, 9]))
    third = text(model, [*HEAD[:40], 200, 201])
    finish(loop)
    assert loop.read_tokens == 71 + 7
    loop.submit(third)
    finish(loop)
    assert third.cached == 32
    assert third.history == alone(model, third)


def test_a_text_that_nobody_waits_for_costs_nothing(model: Model) -> None:
    loop = scheduler(model, 1)
    first, queued, reading = text(model, [5], most=40), text(model, [6]), text(model, HEAD)
    for sequence in (first, queued, reading):
        loop.submit(sequence)
    for _ in range(3):  # two blocks, and the first token
        loop.step()
    queued.cancelled = True
    assert [e.reason for e in loop.step() if e.sequence is queued] == ["cancelled"]
    first.cancelled = True
    before = first.count
    for _ in range(3):  # the slot is free, and the next prompt begins
        loop.step()
    assert (first.count, reading.cached, loop.read_tokens) == (before, 0, 1 + 32)
    reading.cancelled = True
    loop.step()
    assert loop.read_tokens == 1 + 32 and loop.idle


def test_memory_is_bounded(model: Model) -> None:
    probe = Slots(model, 1, CONTEXT)
    loop = scheduler(model, 4, most_bytes=2 * CONTEXT * probe.position_bytes)
    texts = [text(model, [i + 3] * 60, most=30) for i in range(6)]
    for sequence in texts:
        loop.submit(sequence)
    most = 0
    while not loop.idle:
        loop.step()
        most = max(most, loop.slots.nbytes)
    assert 0 < most <= loop.slots.most_bytes
    assert [s.history for s in texts] == [alone(model, s) for s in texts]
    assert not Slots(model, 1, CONTEXT, most_bytes=1).ever_fits(texts[0])


def test_a_paused_text_waits(model: Model) -> None:
    loop = scheduler(model)
    slow, fast = text(model, [5, 6]), text(model, [7, 8])
    for sequence in (slow, fast):
        loop.submit(sequence)
    while not slow.count:
        loop.step()
    written, slow.paused = slow.count, True
    finish(loop)
    assert (slow.count, fast.reason) == (written, "length")
    slow.paused = False
    finish(loop)
    assert slow.history == alone(model, slow)


def test_a_failure_ends_its_texts_alone(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = scheduler(model, 2)
    first, second = text(model, [5, 6]), text(model, [*HEAD, 8])
    loop.submit(first)
    loop.submit(second)
    for _ in range(4):
        loop.step()
    with monkeypatch.context() as patch:
        patch.setattr(Model, "step_many", lambda *_: 1 / 0)
        assert [e.reason for e in loop.step() if e.sequence is first] == ["error"]
    assert [type(problem) for problem in loop.failures] == [ZeroDivisionError]
    finish(loop)
    assert second.history == alone(model, second)


def test_what_cannot_begin_in_time_ends(model: Model) -> None:
    loop = scheduler(model, 1)
    late = text(model, [5])
    late.deadline = 0.0
    loop.submit(late)
    assert [event.reason for event in loop.step()] == ["late"]
    with pytest.raises(OptimError, match="129 tokens, the context 128"):
        text(model, [5] * 129)


def test_chances_and_penalties(model: Model) -> None:
    request = Request([5, 6], Sampling(max_tokens=6), logprobs=3, bias=((77, 1e4),))
    loop, sequence = scheduler(model), Sequence(model, request, CONTEXT)
    loop.submit(sequence)
    tokens = [event.token for event in finish(loop)]
    assert [t.id for t in tokens if t] == [77] * 6
    for token in filter(None, tokens):
        assert token.chance is not None and token.chance <= token.likeliest[0][1] <= 0
        assert len(token.likeliest) == 3
    fresh = replace(request.sampling, frequency_penalty=2.0, max_tokens=40)
    once = Sequence(model, Request([5, 6], fresh), CONTEXT)
    plain = text(model, [5, 6], most=40)
    for one in (once, plain):
        loop.submit(one)
    finish(loop)
    assert len(set(once.history)) >= len(set(plain.history))
