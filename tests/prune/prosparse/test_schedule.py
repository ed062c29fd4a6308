"""The schedule against the paper's Algorithm 1, and the losses against their definitions."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optim.prune.prosparse.losses import kl_divergence, mean_abs, square_head
from optim.prune.prosparse.schedule import Schedule, learning_rate
from optim.prune.prosparse.train import batch_rows


def test_lambda_follows_algorithm_1() -> None:
    schedule = Schedule(steps=130, substitution=10, blend=5, peaks=(0.1, 0.5, 0.5, 1.0))
    assert [schedule.l1(t) for t in (0, 9)] == [0, 0]  # stage 0
    assert schedule.l1(10) == schedule.l1(39) == 0.1  # the warm-up stage is constant
    middle = 10 + 45 - 1  # halfway through stage 2
    assert schedule.l1(middle) == pytest.approx((0.1 + 0.5) / 2)
    quarter = 10 + 37.5 - 1
    eta = 0.5 * (math.sin(-math.pi / 2 + math.pi * 0.25) + 1)
    assert schedule.l1(int(quarter)) < 0.1 + eta * 0.4 < schedule.l1(int(quarter) + 1)
    assert schedule.l1(69) == pytest.approx(0.5)
    assert all(schedule.l1(t) == pytest.approx(0.5) for t in range(70, 100))  # rest
    assert schedule.l1(129) == pytest.approx(1.0)
    assert [schedule.stage(t) for t in (9, 10, 39, 40, 129)] == [0, 1, 1, 2, 4]


@given(
    st.integers(1, 400),
    st.floats(0.01, 1.0),
    st.lists(st.floats(0, 10), max_size=5).map(sorted),
)
def test_lambda_never_falls_and_ends_at_the_last_peak(
    steps: int, share: float, peaks: list[float]
) -> None:
    swap = max(1, round(share * steps))
    schedule = Schedule(steps, swap, max(1, swap // 2), tuple(peaks))
    values = [schedule.l1(t) for t in range(steps)]
    assert all(a <= b + 1e-9 for a, b in pairwise(values))
    if peaks and swap < steps:
        assert values[-1] == pytest.approx(peaks[-1])
    shares = [schedule.relu_share(t) for t in range(steps)]
    assert all(0 < s <= 1 for s in shares) and shares == sorted(shares)
    assert schedule.relu_share(steps) == 1  # whatever the schedule, what is written is ReLU


def test_the_learning_rate_rises_then_falls() -> None:
    rates = [learning_rate(t, 100, 1e-3, 10) for t in range(100)]
    assert rates.index(max(rates)) == 9 and max(rates) <= 1e-3
    assert rates[0] < 2e-4 and rates[-1] < 1e-6


@given(st.integers(1, 9), st.integers(1, 30), st.integers(0, 5))
def test_every_window_is_seen_once_an_epoch(batch: int, count: int, seed: int) -> None:
    steps = -(-2 * count // batch)
    rows = [row for step in range(steps) for row in batch_rows(step, batch, count, seed)]
    assert sorted(rows[:count]) == sorted(rows[count : 2 * count]) == list(range(count))


def test_losses_are_what_they_say() -> None:
    torch.manual_seed(0)
    p, q = torch.randn(2, 2, 3, 7).double()
    logs = p.log_softmax(-1), q.log_softmax(-1)
    expected = (logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean()
    assert float(kl_divergence(p, q)) == pytest.approx(float(expected), rel=1e-4)
    assert float(kl_divergence(p, p)) == pytest.approx(0, abs=1e-6)
    f, g = torch.randn(2, 4, 5, 6)
    g[:, 0] *= 1e4
    f[:, 0] *= 1e4  # a token with huge outputs counts as one token, not as all of them
    by_hand = sum(float(((g - f)[:, t] ** 2).sum(-1).div((f[:, t] ** 2).sum(-1)).mean())
                  for t in range(5)) / 5  # fmt: skip
    assert square_head([f], [g]).tolist() == pytest.approx([by_hand], rel=1e-5)
    assert square_head([f, f], [f, 2 * f]).tolist() == pytest.approx([0, 1])
    assert float(mean_abs(torch.tensor([[1.0, -2.0, 0.0]]))) == pytest.approx(1.0)
