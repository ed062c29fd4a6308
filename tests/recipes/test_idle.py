"""What is typed has an effect, or is refused."""

import json
from pathlib import Path

import pytest

from optim.recipes.build import build_recipe, to_yaml
from optim.recipes.idle import IDLE
from optim.recipes.problems import RecipeError
from optim.recipes.schema import METHODS, PRUNINGS, Calibration

AWQ, GGUF = {"quantize.method": "awq"}, {"quantize.grid": "q4_0"}
CORE, LORA = {"prune.method": "coreinfer"}, {"prune.method": "prosparse", "prune.train": "lora"}
OTHERS = {"calibration.dataset": "owner/name"}
# What is refused, and what makes it count.
CASES = [
    (AWQ | GGUF, "quantize.bits", 4, {"quantize.grid": None}),
    (AWQ | GGUF, "quantize.group_size", "auto", {"quantize.grid": None}),
    (AWQ | GGUF, "quantize.sym", False, {"quantize.grid": None}),
    (AWQ, "quantize.guide_groups", 1, {"quantize.guide": "loss"}),
    (AWQ | {"quantize.compensate": False}, "quantize.damping", 0.1, {"quantize.compensate": True}),
    ({"prune.method": "threshold", "prune.only": "down"}, "prune.allocation", "greedy",
     {"prune.only": "ffn"}),
    (CORE, "prune.alpha", 0.4, {"prune.score": "paper"}),
    ({"prune.method": "prosparse"}, "prune.rank", 32, LORA),
    (AWQ, "calibration.split", "train", OTHERS),
    (AWQ | {"calibration.dataset": "self"}, "calibration.text_column", "text", OTHERS),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "key", "value", "counts"), CASES)
def test_a_typed_key_counts_or_is_refused_at_its_default(
    keys: dict[str, object], key: str, value: object, counts: dict[str, object]
) -> None:
    for flags, sets in (({key: value}, []), ({}, [f"{key}={json.dumps(value)}"])):
        with pytest.raises(RecipeError, match=f"{key} has no effect"):
            build_recipe(None, keys | flags, sets)
        build_recipe(None, keys | counts | flags, sets)


def test_every_row_has_a_case_and_names_keys_that_there_are() -> None:
    named = {key for row in IDLE for key in row.keys}
    assert {key for _, key, _, _ in CASES} == named
    models = {
        "quantize": METHODS.values(),
        "prune": PRUNINGS.values(),
        "calibration": [Calibration],
    }
    known = {f"{s}.{k}" for s, many in models.items() for model in many for k in model.model_fields}
    assert named <= known


def test_a_recipe_that_was_written_out_runs_again(tmp_path: Path) -> None:
    for keys, _, _, _ in CASES:
        recipe = build_recipe(None, keys)
        (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
        assert build_recipe(str(tmp_path / "recipe.yaml")) == recipe
