"""Budgets: the cheapest places are raised first, and the mean is the target."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optim.prune.allocate import allocate, convex

LEVELS = [0.0, 0.25, 0.5, 0.75]


def test_the_cheaper_place_bears_more() -> None:
    found = allocate(
        {"a": [0, 1, 2, 3], "b": [0, 2, 5, 9]}, {"a": 1.0, "b": 1.0}, LEVELS, target=0.5
    )
    assert found == {"a": 0.75, "b": 0.25}


def test_sizes_weigh() -> None:
    found = allocate({"a": [0, 1, 2, 3], "b": [0, 1, 2, 3]}, {"a": 3.0, "b": 1.0}, LEVELS, 0.3)
    assert (3 * found["a"] + found["b"]) / 4 == pytest.approx(0.3)
    assert found["a"] > found["b"]


def test_a_hump_is_bridged() -> None:
    assert convex(LEVELS, [0, 5, 5, 6]) == ([0.0, 0.75], [8.0])


def test_what_the_levels_do_not_reach_is_said() -> None:
    with pytest.raises(ValueError, match="do not reach 90%"):
        allocate({"a": [0, 1, 2, 3]}, {"a": 1.0}, LEVELS, 0.9)


@given(
    st.dictionaries(
        st.sampled_from("abcde"),
        st.tuples(st.floats(0.1, 9), st.lists(st.floats(0, 9), min_size=3, max_size=3)),
        min_size=1,
    ),
    st.floats(0, 0.75),
)
def test_the_budget_is_met(places: dict[str, tuple[float, list[float]]], target: float) -> None:
    sizes = {place: size for place, (size, _) in places.items()}
    losses = {place: [0.0, *loss] for place, (_, loss) in places.items()}
    found = allocate(losses, sizes, LEVELS, target)
    assert all(0 <= level <= 0.75 for level in found.values())
    mean = sum(found[p] * sizes[p] for p in places) / sum(sizes.values())
    assert mean == pytest.approx(target, abs=1e-6)
