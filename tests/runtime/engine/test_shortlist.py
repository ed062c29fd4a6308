"""Texts whose steps read only those rows of the head that can win: the same as from all rows."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from optim.runtime.decoder.decoder import Decoder
from optim.runtime.engine.load import Model, load_model
from optim.runtime.engine.sampling import Sampling
from optim.runtime.engine.scheduler import answer_all
from optim.runtime.engine.sequence import Request
from optim.runtime.kernels.cpu import shortlist

MakeModel = Callable[..., Path]
PROMPTS = ([5, 6, 7, 8, 9, 10, 11], [12, 13], [14] * 30)
GREEDY, DRAWN = Sampling(), Sampling(temperature=2.0, top_k=7, top_p=0.9, min_p=0.01, seed=3)
ALL = Sampling(temperature=1.0, top_p=0.9, seed=3)


@pytest.fixture(scope="module")
def model(make_model: MakeModel) -> Model:
    if not shortlist.usable():
        pytest.skip("no C compiler here")
    return load_model(str(make_model("llama", torch.bfloat16)), device="cpu")


def decoder_of(model: Model) -> Decoder:
    assert isinstance(model.decoder, Decoder) and model.decoder.shortlist is not None
    return model.decoder


def texts(model: Model, *samplings: Sampling) -> list[str]:
    """One of each prompt and sampling, all at once."""
    asked = [Request(prompt, sampling) for sampling in samplings for prompt in PROMPTS]
    return [answer.text for _, answer in sorted(answer_all(model, asked, context=48, size=6))]


@pytest.mark.parametrize("samplings", [(GREEDY,), (DRAWN,), (GREEDY, DRAWN), (GREEDY, ALL)])
def test_the_same_texts(
    samplings: tuple[Sampling, ...], model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = decoder_of(model).shortlist
    assert head is not None
    before = head.tokens
    found = texts(model, *samplings)
    assert ALL in samplings or head.tokens > before
    monkeypatch.setattr(model.decoder, "shortlist", None)
    assert found == texts(model, *samplings)


@pytest.mark.parametrize(
    ("sampling", "best"),
    [
        (GREEDY, 1),
        (DRAWN, 7),
        (ALL, 0),
        (Sampling(repetition_penalty=1.1), 0),
        (Sampling(frequency_penalty=0.1), 0),
    ],
)
def test_how_many_decide(sampling: Sampling, best: int) -> None:
    assert sampling.best == best


def test_what_a_token_reads(model: Model) -> None:
    decoder = decoder_of(model)
    head = decoder.shortlist
    assert head is not None
    model.step_many([(model.new_cache(), [5])], best=1)
    read = head.nbytes + head.rows_read / decoder.head.out_features * decoder.head.nbytes
    assert model.token_bytes == pytest.approx(model.weight_bytes - decoder.head.nbytes + read)


@pytest.mark.parametrize("family", ["gemma2", "granite"])
def test_logits_that_are_changed_afterwards(family: str, make_model: MakeModel) -> None:
    """A cap, or a factor, can make two logits equal that were not."""
    model = load_model(str(make_model(family, torch.bfloat16)), device="cpu")
    assert isinstance(model.decoder, Decoder) and model.decoder.shortlist is None
