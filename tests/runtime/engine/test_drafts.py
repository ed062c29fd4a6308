"""Guesses ahead: the text is the plain one, whatever they are and however it is drawn."""

from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from optim.recipes.errors import OptimError
from optim.runtime.cache.full import Policy
from optim.runtime.engine.drafts import MOST, Drafts, Lookup, lookup
from optim.runtime.engine.load import Model, load_model
from optim.runtime.engine.sampling import Guess, Sampler, Sampling
from optim.runtime.engine.scheduler import write
from optim.runtime.engine.sequence import Event, Request, Sequence
from optim.runtime.engine.session import Session
from optim.runtime.engine.slots import Slot, Slots
from tests.runtime.decoder.test_c_decode import SCHEMES, built, with_packed_linears

MakeModel = Callable[..., Path]
PROMPTS = {"lookup": 100, "auto": 20}
in_c = pytest.mark.skipif(not built(), reason="no C compiler here")


@pytest.fixture(scope="module")
def model(make_model: MakeModel) -> Model:
    model = load_model(str(make_model("mistral")), device="cpu")
    with_packed_linears(model, SCHEMES[0])
    return model


def prompt(seed: int) -> list[int]:
    """A text that says things again."""
    random = Random(seed)
    phrase = [random.randrange(3, 60) for _ in range(random.randrange(3, 9))]
    return (phrase * 4)[: random.randrange(9, 33)]


def written(
    model: Model,
    ids: list[int],
    sampling: Sampling,
    context: int = 100,
    drafts: Drafts | None = None,
    policy: Policy | None = None,
) -> tuple[list[int], str, Slot]:
    """The text that follows `ids`, why it ended, and its slot."""
    slots = Slots(model, 1, context, policy=policy, alike=False)
    text = Sequence(model, Request(ids, sampling), slots.limit, drafts=drafts)
    for _ in write(text, slots):
        pass
    return text.history, text.reason, slots.slots[0]


def lengths(slot: Slot) -> tuple[int, int]:
    assert slot.cache is not None
    return slot.cache.length, len(slot.ids)


DRAWN = [
    Sampling(max_tokens=40),
    Sampling(temperature=0.4, top_p=0.9, seed=7, max_tokens=40),
    Sampling(temperature=0.3, top_k=20, min_p=0.02, repetition_penalty=1.02, seed=3, max_tokens=40),
]


@in_c
@pytest.mark.parametrize("kind", ["lookup", "auto"])
@pytest.mark.parametrize("sampling", DRAWN, ids=["greedy", "cool", "penalty"])
def test_a_hundred_texts_are_the_plain_ones(kind: str, sampling: Sampling, model: Model) -> None:
    drafted = accepted = 0
    for seed in range(PROMPTS[kind]):
        ids, drafts = prompt(seed), lookup(kind)
        assert drafts is not None
        plain = written(model, ids, sampling, 60)
        guessed = written(model, ids, sampling, 60, drafts)
        assert guessed[:2] == plain[:2]
        assert lengths(plain[2]) == lengths(guessed[2])
        drafted, accepted = drafted + drafts.drafted, accepted + drafts.accepted
    assert accepted <= drafted
    if kind == "lookup":
        assert accepted > 0  # else nothing was tried here


@in_c
@pytest.mark.parametrize("policy", [Policy(8), Policy(4), Policy(16, "stream")], ids=str)
def test_every_cache(policy: Policy, model: Model) -> None:
    for seed in range(6):
        ids, sampling = prompt(seed), Sampling(temperature=0.3, seed=1, max_tokens=150)
        plain = written(model, ids, sampling, 120, policy=policy)
        guessed = written(model, ids, sampling, 120, Lookup(always=True), policy)
        assert guessed[:2] == plain[:2]
        states = [slot.cache.state() for slot in (plain[2], guessed[2])]  # type: ignore[union-attr]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@in_c
def test_a_step_that_is_interrupted_leaves_no_guess(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, slots = prompt(1), Slots(model, 1, 100, alike=False)
    text = Sequence(model, Request(ids, Sampling()), 100, drafts=Lookup(always=True))
    monkeypatch.setattr(Sequence, "take", interrupted_after(9, Sequence.take))
    with pytest.raises(KeyboardInterrupt):
        for _ in write(text, slots):
            pass
    assert text.count == 9 and text.history == written(model, ids, Sampling(max_tokens=9))[0]
    cache = slots.slots[0].cache
    assert cache is not None and cache.length <= len(ids) + 8


def interrupted_after(count: int, take: Callable[..., Event]) -> Callable[..., Event]:
    def taking(text: Sequence, logits: Tensor, guess: Guess | None = None) -> Event:
        if text.count == count:
            raise KeyboardInterrupt
        return take(text, logits, guess)

    return taking


def test_models_outside_the_c_step_guess_nothing(make_model: MakeModel) -> None:
    model = load_model(str(make_model("opt")), device="cpu")
    drafts, sampling = Lookup(always=True), Sampling(max_tokens=40)
    ids = [5, 6, 7] * 5
    plain = written(model, ids, sampling)
    assert written(model, ids, sampling, drafts=drafts)[:2] == plain[:2]
    assert drafts.drafted == 0


@in_c
def test_a_session_counts_them(model: Model) -> None:
    texts = []
    for kind in ("off", "lookup"):
        session = Session(model, sampling=Sampling(max_tokens=40), speculate=kind)
        texts.append("".join(session.complete("abcabcabcabcabc")))
        assert (session.stats.drafted_tokens > 0) == (kind == "lookup")
        assert session.stats.accepted_tokens <= session.stats.drafted_tokens
    assert texts[0] == texts[1]
    with pytest.raises(OptimError, match="no drafts are called 'magic'"):
        Session(model, speculate="magic")


def proposed(drafts: Lookup, history: list[int], most: int) -> list[int]:
    sampler = Sampler(Sampling(), torch.device("cpu"))
    return [guess.token for guess in drafts.propose(history, most, sampler)]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, MOST))
def test_a_guess_is_what_followed_before(history: list[int], most: int) -> None:
    guess = proposed(Lookup(always=True), history, most)
    for n in range(5, 1, -1):
        ends = [e for e in range(n, len(history)) if history[e - n : e] == history[-n:]]
        if ends and len(history) > n:
            assert guess == history[ends[-1] : ends[-1] + most]
            return
    assert guess == []


def test_told_token_by_token_or_at_once() -> None:
    random = Random(0)
    history, grown = [], Lookup(always=True)
    for _ in range(200):
        history.append(random.randrange(4))
        assert proposed(grown, history, 5) == proposed(Lookup(always=True), history, 5)


def run(drafts: Lookup, slope: float, right: int, steps: int = 400) -> int:
    """How many tokens are guessed where each costs `slope` of a step and `right` are right."""
    history = [1, 2, 3] * 10
    for _ in range(steps):
        guess = proposed(drafts, history, MOST)
        drafts.learn(len(guess), min(right, len(guess)), 0.01 * (1 + slope * len(guess)))
        history.append(history[-3])
    return drafts.drafted


def test_guesses_that_do_not_pay_end() -> None:
    assert run(Lookup(), slope=0.1, right=MOST) > 400
    assert run(Lookup(), slope=0.2, right=0) < 400 // 8
    assert run(Lookup(), slope=1.0, right=1) < 400 // 8
    assert run(Lookup(always=True), slope=1.0, right=0) > 400
