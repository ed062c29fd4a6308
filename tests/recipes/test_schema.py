"""What a recipe may say."""

import pytest
from pydantic import ValidationError

from optim.recipes.build import build_recipe
from optim.recipes.errors import OptimError
from optim.recipes.patterns import MAX_NAME, check_pattern, matches
from optim.recipes.schema import METHODS, PRUNINGS, SECTIONS, Awq, Recipe, json_schema


def test_the_defaults_are_the_documented_ones() -> None:
    recipe = build_recipe(None, {"quantize.method": "awq"})
    assert recipe.calibration.model_dump() == {
        "dataset": "builtin:mixed",
        "split": None,
        "text_column": "text",
        "num_samples": 64,
        "seq_len": 512,
        "seed": 0,
    }
    assert recipe.quantize.model_dump() == {
        "method": "awq",
        "bits": 4,
        "group_size": "auto",
        "sym": False,
        "grid": None,
        "targets": ("Linear",),
        "ignore": ("lm_head",),
        "lm_head_bits": None,
        "overrides": (),
        "guide": "none",
        "guide_groups": 1,
        "sweeps": 0,
        "n_grid": 20,
        "duo": "both",
        "clip": True,
        "compensate": True,
        "damping": 0.1,
    }


@pytest.mark.parametrize("method", METHODS)
def test_each_method_builds_its_own_class(method: str) -> None:
    assert type(build_recipe(None, {"quantize.method": method}).quantize) is METHODS[method]


@pytest.mark.parametrize("method", PRUNINGS)
def test_each_pruning_builds_its_own_class(method: str) -> None:
    assert type(build_recipe(None, {"prune.method": method}).prune) is PRUNINGS[method]


def test_a_recipe_is_frozen() -> None:
    recipe = build_recipe("awq-w4")
    with pytest.raises(ValidationError, match="frozen"):
        recipe.quantize.bits = 8  # type: ignore[misc]
    assert hash(recipe) == hash(build_recipe("awq-w4"))


def test_an_override_keeps_what_it_says_apart_from_what_it_leaves_out() -> None:
    override = {"targets": ["re:.*down_proj"], "bits": 8}
    recipe = Recipe.model_validate(
        {"version": 1, "quantize": {"method": "awq", "overrides": [override]}}
    )
    assert isinstance(recipe.quantize, Awq)
    (made,) = recipe.quantize.overrides
    assert (made.targets, made.bits, made.group_size, made.sym) == (
        ("re:.*down_proj",),
        8,
        None,
        None,
    )


def test_patterns_match_as_in_compressed_tensors() -> None:
    name = "model.layers.0.mlp.down_proj"
    assert matches("Linear", name)
    assert matches(name, name)
    assert matches("re:.*down", name)
    assert not matches("re:down", name)
    assert not matches("down_proj", name)
    assert not matches("Linear", name, kind="Embedding")


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("", "must not be empty"),
        ("x" * 257, "at most 256 characters"),
        ("re:(", "not a valid regular expression"),
        ("re:(a+)+b", "take forever"),
        ("re:((a*b))*", "take forever"),
        ("re:(a|a)*b", "take forever"),
        ("re:(?:a?){50}", "take forever"),
        ("re:" + "a?" * 30 + "a" * 30, "take forever"),
        ("re:(a{1,9})+?", "take forever"),
        ("re:" + ".*x" * 7, "take forever"),
        ("re:" + ".*x" * 4, "take forever"),
        ("re:.{0,99}x.{0,99}x.+x.*x", "take forever"),
    ],
)
def test_unusable_patterns_are_refused(pattern: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_pattern(pattern)


@pytest.mark.parametrize(
    "pattern", [r"re:layers\.(0|1)\.", r"re:.*\.(\d+)\.[*+]?\(.*?(q|k)_", "re:.*x.*x.*x.*"]
)
def test_usual_patterns_are_allowed(pattern: str) -> None:
    assert check_pattern(pattern) == pattern


def test_the_costliest_pattern_is_cheap() -> None:
    """Three spans over the longest name that is looked at: some three million ways, not 4000^6."""
    name = "a" * MAX_NAME
    assert not matches(check_pattern("re:.*a.*a.*ab"), name)
    with pytest.raises(OptimError, match="at most") as caught:
        matches("re:.*", name + "a")
    assert caught.value.code == 2


def test_the_json_schema_names_every_method() -> None:
    sections = json_schema()["properties"]
    for section, methods in SECTIONS.items():
        (union,) = (kind for kind in sections[section]["anyOf"] if "discriminator" in kind)
        assert set(union["discriminator"]["mapping"]) == set(methods)


def test_quantize_and_pack_go_together() -> None:
    recipe = build_recipe(None, {"quantize.method": "rtn"}, ["pack.layout=bf12"])
    assert recipe.quantize is not None and recipe.pack is not None
    assert (recipe.quantize.method, recipe.pack.layout, recipe.prune) == ("rtn", "bf12", None)


def test_training_takes_more_text_unless_the_recipe_says_how_much() -> None:
    trained = build_recipe(None, {"prune.method": "prosparse"}, []).calibration
    assert (trained.num_samples, trained.seq_len) == (600, 256)
    told = {"prune.method": "prosparse", "calibration.num_samples": 8}
    assert build_recipe(None, told, []).calibration.num_samples == 8
    assert build_recipe(None, {"prune.method": "threshold"}, []).calibration.num_samples == 64


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"l1": [0.2, 0.1]}, "must not fall"),
        ({"batch": 3, "micro_batch": 2}, "multiple of micro_batch"),
        ({"kl": 0, "square_head": 0}, "above 0"),
        ({"train": "all"}, "'ffn', 'lora' or 'full'"),
    ],
)
def test_a_training_that_cannot_be_done_is_refused(keys: dict[str, object], words: str) -> None:
    named = {f"prune.{key}": value for key, value in keys.items()}
    with pytest.raises(OptimError, match=words):
        build_recipe(None, {"prune.method": "prosparse"} | named, [])
