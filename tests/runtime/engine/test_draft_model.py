"""A smaller model drafts: greedy text is the plain one, drawn text is as likely."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from optim.recipes.errors import OptimError
from optim.runtime.cache.full import Policy
from optim.runtime.engine import draft_model
from optim.runtime.engine.draft_model import ModelDrafts
from optim.runtime.engine.load import Model, load_model
from optim.runtime.engine.sampling import Sampling, distribution
from optim.runtime.engine.session import Session
from tests.runtime.decoder.test_c_decode import built
from tests.runtime.engine.test_drafts import DRAWN, lengths, prompt, written

MakeModel = Callable[..., Path]
pytestmark = pytest.mark.skipif(not built(), reason="no C compiler here")


@pytest.fixture(scope="module")
def target(make_model: MakeModel) -> Model:
    return load_model(str(make_model("mistral", torch.bfloat16)), device="cpu")


@pytest.fixture
def draft(make_model: MakeModel) -> Model:
    """The same, other in part: often right, and often wrong."""
    model = load_model(str(make_model("mistral", torch.bfloat16)), device="cpu")
    generator = torch.Generator().manual_seed(0)
    for block in model.decoder.blocks:  # type: ignore[attr-defined]
        weight = block.mlp.down.weight
        weight.mul_(1 + 0.3 * torch.randn(weight.shape, generator=generator))
    model.weight_bytes //= 3
    return model


@pytest.mark.parametrize("policy", [Policy(), Policy(8), Policy(4)], ids=str)
def test_greedy_texts_are_the_plain_ones(policy: Policy, target: Model, draft: Model) -> None:
    drafts = ModelDrafts(draft, target, 60)  # kept from text to text
    for seed in range(12):
        for sampling in (DRAWN[0], Sampling(repetition_penalty=1.2, max_tokens=30)):
            plain = written(target, prompt(seed), sampling, 60, policy=policy)
            found = written(target, prompt(seed), sampling, 60, drafts, policy)
            assert found[:2] == plain[:2] and lengths(found[2]) == lengths(plain[2])
    assert 0 < drafts.accepted < drafts.drafted


def test_a_seed_repeats(target: Model, draft: Model) -> None:
    texts = [
        written(target, [5, 6, 7], DRAWN[1], 60, ModelDrafts(draft, target, 60))[0]
        for _ in range(2)
    ]
    assert texts[0] == texts[1]


def likely(
    model: Model, ids: list[int], sampling: Sampling, left: int
) -> Iterator[tuple[tuple[int, ...], float]]:
    """Every text of `left` tokens that may follow `ids`, and how likely it is."""
    if not left:
        yield (), 1.0
        return
    logits = model.forward(torch.tensor([ids]), model.new_cache())[0]
    chances = distribution(logits.numpy(), sampling).spread(len(logits))
    for token in chances.nonzero()[0].tolist():
        for rest, chance in likely(model, [*ids, token], sampling, left - 1):
            yield (token, *rest), chance * float(chances[token])


@pytest.mark.parametrize(
    ("limits", "each"), [({"top_k": 3}, 0.0), ({"top_k": 4, "min_p": 0.4}, 0.35)], ids=str
)
def test_first_tokens_are_as_likely(
    limits: dict[str, Any],
    each: float,
    target: Model,
    draft: Model,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over twenty seeds of sixty texts each, beside what the model's own logits say.

    A token costs nothing, so there are always two drafts; or the second one is drawn only where the
    first was likely.
    """
    monkeypatch.setattr(draft_model, "MOST", 2)
    ids, count, new = [5, 6, 7, 8, 9], 20 * 60, 3
    drafts = ModelDrafts(draft, target, 20)
    drafts._each = each
    monkeypatch.setattr(target.tokenizer, "eos_ids", set())
    drawn: Counter[tuple[int, ...]] = Counter()
    for seed in range(count):
        sampling = Sampling(temperature=0.7, max_tokens=new, seed=seed, **limits)
        drawn[tuple(written(target, ids, sampling, 20, drafts)[0][len(ids) :])] += 1
    expected = dict(likely(target, ids, sampling, new))
    assert drawn.keys() <= expected.keys()
    assert len(expected) > 7 and count / 4 < drafts.accepted < drafts.drafted - count / 4
    chi2 = sum((drawn[text] - p * count) ** 2 / (p * count) for text, p in expected.items())
    halves = torch.tensor([(len(expected) - 1) / 2, chi2 / 2], dtype=torch.float64)
    assert torch.special.gammaincc(*halves) > 0.01


def test_a_conversation_counts_them_and_may_be_left(target: Model, draft: Model) -> None:
    plain = Session(target, sampling=Sampling(max_tokens=20), speculate="off")
    session = Session(target, sampling=Sampling(max_tokens=20), draft=draft)
    for text in ("abcabcabc", "and so on", "abcabcabc"):
        assert list(session.complete(text)) == list(plain.complete(text))
        assert 0 < session.stats.drafted_tokens < 60
        left = session.complete(text + "d")
        next(left)
        left.close()


def test_a_text_that_outgrows_the_draft_goes_on(target: Model, draft: Model) -> None:
    drafts, sampling = ModelDrafts(draft, target, 12), Sampling(max_tokens=40)
    plain = written(target, [5, 6, 7], sampling)
    assert written(target, [5, 6, 7], sampling, drafts=drafts)[:2] == plain[:2]
    assert 0 < drafts.drafted < 12


def test_what_does_not_fit_is_refused(
    make_model: MakeModel, target: Model, draft: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OptimError, match="drafting gains nothing"):
        Session(draft, draft=target)
    other = load_model(str(make_model("opt")), device="cpu")
    monkeypatch.setattr(draft.tokenizer, "bos_id", None)
    with pytest.raises(OptimError, match="one token at a time"):
        other.weight_bytes = 10 * draft.weight_bytes
        Session(other, draft=draft)
    monkeypatch.setattr(type(draft.tokenizer), "vocabulary", property(id))
    with pytest.raises(OptimError, match="other tokens"):
        Session(target, draft=draft)
