"""Sampling against transformers' logits processors, and against the distribution itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optim.recipes.errors import OptimError
from optim.runtime.engine.repeats import repeats
from optim.runtime.engine.sampling import (
    Sampler,
    Sampling,
    default_sampling,
    distribution,
    likeliest,
    own_sampling,
    penalize,
)

CPU = torch.device("cpu")


def _logits(seed: int, size: int = 31) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


def _full(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Chances of all ids, whatever form `distribution` returns."""
    return torch.from_numpy(distribution(logits.numpy(), sampling).spread(len(logits))).float()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.integers(0, 40),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    penalty=st.sampled_from([1.0, 1.3, 0.7]),
)
def test_distribution_equals_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float, penalty: float
) -> None:
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits, seen = _logits(seed), torch.tensor([1, 5, 7])
    theirs = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty)])
    theirs.append(TemperatureLogitsWarper(temperature))
    if top_k:
        theirs.append(TopKLogitsWarper(top_k))
    theirs.append(TopPLogitsWarper(top_p))
    theirs.append(MinPLogitsWarper(min_p))
    wanted = torch.softmax(theirs(seen[None], logits[None].clone())[0], -1)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    torch.testing.assert_close(_full(penalize(logits, seen, penalty), sampling), wanted)


def test_draws_follow_the_distribution() -> None:
    logits = _logits(3, 6)
    sampling = Sampling(temperature=0.8, top_p=0.95, seed=11)
    sample = Sampler(sampling, CPU)
    count = 4000
    drawn = torch.bincount(torch.tensor([sample(logits, []) for _ in range(count)]), minlength=6)
    expected = _full(logits, sampling) * count
    # five degrees of freedom: one in 2,400; the seed is fixed
    assert chi_square(drawn, expected) < 22.5


def test_a_seed_repeats_and_seeds_differ() -> None:
    def draw(seed: int) -> list[int]:
        sample = Sampler(Sampling(temperature=1.5, seed=seed), CPU)
        return [sample(_logits(1), []) for _ in range(20)]

    assert draw(4) == draw(4)
    assert draw(4) != draw(5)


def test_greedy_takes_the_likeliest_after_the_penalty() -> None:
    logits = torch.tensor([1.0, 2.0, 1.9, -1.0])
    assert Sampler(Sampling(), CPU)(logits, [1]) == 1
    assert Sampler(Sampling(repetition_penalty=2.0), CPU)(logits, [1, 1]) == 2


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"repetition_penalty": 0},
        {"max_tokens": 0},
        {"stop": ("",)},
        {"seed": 2**63},
        {"seed": -(2**63) - 1},
    ],
)
def test_nonsense_is_refused_by_name(bad: dict[str, float]) -> None:
    with pytest.raises(OptimError, match=next(iter(bad))) as caught:
        Sampling(**bad)  # type: ignore[arg-type]
    assert caught.value.code == 2


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    spread=st.sampled_from([0.01, 1.0, 4.0, 20.0]),
    share=st.sampled_from([0.01, 0.5, 0.95, 0.999]),
)
def test_top_p_keeps_what_a_full_sort_keeps(seed: int, spread: float, share: float) -> None:
    logits = _logits(seed, 3000) * spread
    kept = _full(logits, Sampling(temperature=1, top_p=share)) > 0
    chances = torch.softmax(logits, -1).double()
    falling, places = chances.sort(descending=True)
    wanted = int((falling.cumsum(-1) - falling < share - 1e-6).sum())
    assert kept[places[:wanted]].all()
    assert not kept[places[int((falling.cumsum(-1) - falling < share + 1e-6).sum()) :]].any()


def test_what_has_no_chance_is_never_drawn() -> None:
    sample = Sampler(Sampling(temperature=1, seed=0), CPU)
    logits = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0]).log()
    assert {sample(logits, []) for _ in range(500)} == {1, 3}


@given(st.integers(0, 1000), st.integers(1, 400), st.sampled_from([31, 64, 300, 5000]))
def test_the_likeliest_come_first(seed: int, count: int, size: int) -> None:
    logits = _logits(seed, size).round(decimals=1)  # some are alike
    falling = logits.sort(descending=True).values[:count]
    assert torch.equal(logits[likeliest(logits.numpy(), count)], falling)


@pytest.mark.parametrize("limits", [{}, {"top_k": 4}, {"top_p": 0.8}], ids=str)
def test_checked_guesses_follow_the_distribution(limits: dict[str, float]) -> None:
    """Guesses of other logits, of which some have no chance at all here."""
    sampling = Sampling(temperature=0.8, seed=5, **limits)  # type: ignore[arg-type]
    sample, logits, others = Sampler(sampling, CPU), _logits(3, 6), _logits(4, 6)
    drawn, taken, count = torch.zeros(6), 0, 4000
    for _ in range(count):
        guess = sample.guess(others, [])
        token = sample(logits, [], guess)
        drawn[token] += 1
        taken += token == guess.token
    wanted, had = _full(logits, sampling), _full(others, sampling)
    assert chi_square(drawn, wanted * count) < 22.5
    assert abs(taken / count - torch.minimum(wanted, had).sum()) < 0.03


def chi_square(drawn: torch.Tensor, expected: torch.Tensor) -> float:
    """Of counts; what has no chance must not have come."""
    held = expected > 0
    assert drawn[~held].sum() == 0
    return float(((drawn - expected)[held] ** 2 / expected[held]).sum())


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ({}, {}),
        ({"do_sample": True}, {"temperature": 1.0, "top_k": 50}),
        ({"temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "top_p": 0.9, "top_k": 50}),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
        ({"repetition_penalty": 1.1, "top_k": None}, {"repetition_penalty": 1.1}),
        ({"do_sample": True, "top_k": 20, "min_p": 0.1}, {"top_k": 20, "min_p": 0.1}),
    ],
)
def test_a_generation_config_is_read_as_transformers_reads_it(
    tmp_path: Path, said: dict[str, Any], wanted: dict[str, Any]
) -> None:
    assert default_sampling(tmp_path)["temperature"] == 0.7
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    own = own_sampling(tmp_path)
    assert {**own, **wanted} == own
    assert ("temperature" in own) == ("temperature" in wanted or bool(said.get("do_sample")))
    assert default_sampling(tmp_path)["temperature"] == own.get("temperature", 0.7)


@pytest.mark.parametrize(
    "bad",
    [{"temperature": "1"}, {"top_k": 2.5}, {"top_p": 7}, {"temperature": True}, {"top_k": -1}],
)
def test_a_senseless_generation_config_is_named(tmp_path: Path, bad: dict[str, Any]) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(bad))
    with pytest.raises(OptimError, match=next(iter(bad))) as caught:
        own_sampling(tmp_path)
    assert caught.value.code == 2
    assert str(path) in caught.value.message


def test_a_loop_is_one_phrase_four_times_and_long() -> None:
    phrase = list(range(30))
    assert not repeats(phrase * 3)
    assert repeats(phrase * 4)
    assert repeats([9, 9, *phrase * 5, 0, 1])
    assert not repeats([*phrase * 5, 77])
    assert not repeats([5] * 63)
    assert repeats([5] * 64)
    assert not repeats([])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_no_number_is_refused(bad: float, temperature: float) -> None:
    logits = torch.tensor([1.0, bad, float("-inf")])
    with pytest.raises(OptimError, match="not a finite number"):
        Sampler(Sampling(temperature=temperature), torch.device("cpu"))(logits, [])
