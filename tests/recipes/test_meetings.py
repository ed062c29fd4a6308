"""Which sections of a recipe may meet."""

from itertools import combinations
from pathlib import Path

import pytest

from optim.recipes.build import build_recipe, builtin
from optim.recipes.errors import OptimError
from optim.recipes.meetings import APART, ORDER, sections
from optim.recipes.schema import PRUNINGS

ANY = {
    "quantize": {"quantize.method": "awq"},
    "tune": {"tune.loss": "end"},
    "prune": {"prune.method": "threshold"},
    "pack": {"pack.layout": "bf12"},
    "export": {"export.format": "mlx"},
}


@pytest.mark.parametrize("count", range(1, 6))
def test_all_combinations_with_quantize_may_meet(count: int) -> None:
    for names in combinations(ORDER, count):
        if "quantize" in names or (count == 1 and names != ("tune",)):
            keys = {key: value for name in names for key, value in ANY[name].items()}
            assert sections(build_recipe(None, keys)) == names


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"prune.method": "coreinfer", "quantize.method": "mergequant"}, "columns of static"),
        ({"prune.method": "threshold", "pack.layout": "bf12"}, "rows cannot be skipped"),
        ({"prune.method": "threshold", "export.format": "gguf"}, "is not carried over"),
        ({"quantize.method": "mergequant", "export.format": "gguf"}, "the steps of its activ"),
        ({"quantize.method": "mergequant", "tune.loss": "end"}, "its scales are steps of integers"),
        ({"tune.loss": "end", "pack.layout": "bf12"}, "tune goes on from quantize"),
        ({"quantize.method": "rtn", "pack.cast": True}, "would round the scales"),
        *(
            ({"prune.method": "prosparse", **ANY[other]}, "go on from the folder")
            for other in ("quantize", "pack", "export")
        ),
    ],
)
def test_others_may_not_and_say_why(keys: dict[str, object], why: str) -> None:
    with pytest.raises(OptimError, match=why) as caught:
        build_recipe(None, keys)
    assert caught.value.code == 2


def test_the_page_says_when_to_choose_each_built_in_recipe() -> None:
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert [name for name in builtin() if f"`{name}`" not in page] == []


def test_the_table_speaks_of_sections_and_methods_that_there_are() -> None:
    for row in APART:
        for part in (row.first, row.second):
            assert part.section in ORDER
            if part.section == "prune":
                assert set(part.values) <= set(PRUNINGS)
