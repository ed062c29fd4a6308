"""Many tokens in one C call: logits and caches are, in every bit, those of a step a token."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optim.runtime.cache import quantized
from optim.runtime.cache.full import Policy
from optim.runtime.engine.load import Model, load_model
from optim.runtime.formats.pack_quantized import Scheme
from tests.runtime.decoder.test_c_decode import (
    ABLE,
    SCHEMES,
    built,
    in_planes,
    with_linears,
    with_packed_linears,
)

MakeModel = Callable[..., Path]
pytestmark = pytest.mark.skipif(not built(), reason="no C compiler here")
LIMIT = 48  # of a cache: streams forget within a test
POLICIES = [Policy(bits, kind) for bits in (16, 8, 4) for kind in ("full", "stream")]
Plan = list[list[int]]
"""Step by step, how many tokens each text goes on by; 0: it is not in the step."""


def plans(texts: int, most: int) -> st.SearchStrategy[Plan]:
    row = st.lists(st.integers(0, most), min_size=texts, max_size=texts)
    return st.lists(row, min_size=1, max_size=4)


def check(model: Model, policy: Policy, lengths: list[int], plan: Plan) -> None:
    """Texts of `lengths` go on together as `plan` says, and alone."""
    decoder = model.decoder
    caches = [
        [model.new_cache(length=LIMIT, policy=policy) for _ in lengths] for _ in ("many", "alone")
    ]
    generator = torch.Generator().manual_seed(len(plan))
    prompts = [torch.randint(3, 200, (1, n), generator=generator) for n in lengths]
    for row in caches:
        for cache, prompt in zip(row, prompts, strict=True):
            model.forward(prompt, cache)
    many, alone = caches
    for counts in plan:
        ids = [torch.randint(3, 200, (n,), generator=generator).tolist() for n in counts]
        rows = [i for i, n in enumerate(counts) if n]
        got = model.step_many([(many[i], ids[i]) for i in rows])
        for i, logits in zip(rows, got, strict=True):
            for token, line in zip(ids[i], logits, strict=True):
                assert torch.equal(model.forward(torch.tensor([[token]]), alone[i])[0], line)
    for a, b in zip(many, alone, strict=True):
        assert a.length == b.length
        same(a.state(), b.state())  # type: ignore[attr-defined]
    assert decoder.one_call is not None  # type: ignore[attr-defined]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture(scope="module")
def model(make_model: MakeModel, isa: str) -> Model:
    """A window, grouped heads; 4 bits with zero points. At every level of instructions."""
    model = load_model(str(make_model("mistral")), device="cpu")
    with_packed_linears(model, SCHEMES[0])
    return model


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_texts_of_any_lengths(policy: Policy, model: Model) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantized, "RECENT", 8)  # so that some grow old within a test

        @given(st.lists(st.integers(1, 24), min_size=3, max_size=3), plans(3, 8))
        @settings(max_examples=12, deadline=None, database=None)
        def run(lengths: list[int], plan: Plan) -> None:
            if policy.kind == "full":  # which has a limit
                lengths = [
                    min(n, LIMIT - sum(row[i] for row in plan)) for i, n in enumerate(lengths)
                ]
            check(model, policy, lengths, plan)

        run()


def test_sixteen_tokens_and_five_texts(model: Model) -> None:
    check(model, Policy(), [3, 9, 1, 20, 12], [[16, 0, 5, 3, 1], [1, 1, 1, 1, 1]])


@pytest.mark.parametrize("family", sorted(ABLE))
def test_every_family(family: str, make_model: MakeModel) -> None:
    model = load_model(str(make_model(family)), device="cpu")
    with_packed_linears(model, SCHEMES[0])
    check(model, Policy(), [7, 20], [[4, 1], [1, 5], [0, 3]])


@pytest.mark.parametrize("scheme", SCHEMES[1:], ids=str)
def test_every_layout(scheme: Scheme, make_model: MakeModel) -> None:
    model = load_model(str(make_model("qwen2")), device="cpu")
    with_packed_linears(model, scheme)
    check(model, Policy(), [7, 20], [[4, 1], [1, 5]])


@pytest.mark.parametrize("planes", [False, True])
def test_bf16_weights(planes: bool, make_model: MakeModel, isa: str) -> None:
    model = load_model(str(make_model("qwen2", torch.bfloat16)), device="cpu")
    if planes:
        with_linears(model, in_planes)
    check(model, Policy(), [7, 20, 3], [[4, 1, 3], [1, 5, 9], [2, 6, 0], [0, 7, 0]])


def test_two_threads_and_more(make_model: MakeModel) -> None:
    before = torch.get_num_threads()
    model = load_model(str(make_model("qwen3")), device="cpu", threads=5)
    try:
        with_packed_linears(model, SCHEMES[0])
        check(model, Policy(), [7, 20, 2], [[4, 1, 8], [1, 5, 1]])
    finally:
        torch.set_num_threads(before)


def test_a_short_prompt_is_its_steps(make_model: MakeModel) -> None:
    model = load_model(str(make_model("llama")), device="cpu")
    decoder = with_packed_linears(model, SCHEMES[0])
    assert decoder.one_call is not None
    ids = [[5, 6, 7, 8, 9, 10, 11, 12]]
    at_once, steps = model.new_cache(), model.new_cache()
    logits = model.forward(torch.tensor(ids), at_once, all_logits=True)[0]
    for token, line in zip(ids[0], logits, strict=True):
        assert torch.equal(model.forward(torch.tensor([[token]]), steps)[0], line)
    again = model.new_cache()
    assert torch.equal(model.forward(torch.tensor(ids), again)[0], logits[-1])


def test_what_is_taken_back_leaves_no_trace(make_model: MakeModel) -> None:
    model = load_model(str(make_model("llama")), device="cpu")
    with_packed_linears(model, SCHEMES[0])
    for policy in POLICIES:
        tried, plain = (model.new_cache(length=LIMIT, policy=policy) for _ in range(2))
        for cache in (tried, plain):
            model.forward(torch.tensor([[5] * 20]), cache)
        for token in range(30, 50):
            _, count = tried.place_run(6)  # type: ignore[attr-defined]
            model.step_many([(tried, [token, 7, 8, 9, 10, 11][:count])])
            tried.truncate(plain.length + 1)
            model.step_many([(plain, [token])])
            if plain.length == LIMIT:
                break
        same(tried.state(), plain.state())  # type: ignore[attr-defined]


def test_a_cache_that_grows(make_model: MakeModel) -> None:
    """It lies elsewhere then, and C is told."""
    model = load_model(str(make_model("llama")), device="cpu")
    with_packed_linears(model, SCHEMES[0])
    cache, whole = model.new_cache(), model.new_cache()
    tokens = list(range(3, 123))
    whole.reserve(120)  # type: ignore[attr-defined]
    for at in range(0, 120, 8):
        got = model.step_many([(cache, tokens[at : at + 8])])[0]
        wanted = model.step_many([(whole, tokens[at : at + 8])])[0]
        assert torch.equal(got, wanted)
