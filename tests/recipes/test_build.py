"""One way from a command line to a recipe."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optim.recipes.build import build_recipe, builtin, to_yaml
from optim.recipes.errors import OptimError
from optim.recipes.meetings import sections
from optim.recipes.schema import METHODS, PRUNINGS, Awq, Recipe
from optim.recipes.yaml_source import parse_mapping


def message(*arguments: object) -> str:
    with pytest.raises(OptimError) as caught:
        build_recipe(*arguments)  # type: ignore[arg-type]
    assert caught.value.code == 2
    return caught.value.message


def test_flags_go_over_the_file_and_sets_over_the_flags() -> None:
    recipe = build_recipe(
        "awq-w4g64",
        {"quantize.bits": 3, "quantize.group_size": 32, "quantize.sym": None},
        ["quantize.bits=8", "quantize.ignore=[lm_head, 're:.*down']", "calibration.seed=7"],
    )
    assert (recipe.quantize.bits, recipe.quantize.group_size) == (8, 32)
    assert recipe.quantize.sym is False
    assert recipe.quantize.ignore == ("lm_head", "re:.*down")
    assert recipe.calibration.seed == 7


def test_a_flag_equals_its_set() -> None:
    flags = {"quantize.method": "awq", "quantize.duo": False, "calibration.num_samples": 3}
    sets = ["quantize.method=awq", "quantize.duo=false", "calibration.num_samples=3"]
    assert build_recipe(None, flags) == build_recipe(None, {}, sets)


def test_a_set_can_give_overrides() -> None:
    recipe = build_recipe("awq-w4", {}, ["quantize.overrides=[{targets: [a], bits: 8}]"])
    assert recipe.quantize.overrides[0].bits == 8


def test_problems_name_the_flag() -> None:
    flags = {"quantize.method": "awq", "quantize.group_size": 48, "calibration.dataset": ""}
    assert message(None, flags, ["calibration.sed=3"]) == (
        "the command line is not a valid recipe (3 problems)\n"
        "  --calibration: calibration.dataset: must not be empty (got '')\n"
        "  --group-size: quantize.group_size: "
        "must be 'auto', -1, 16, 32, 64, 128 or 256 (got 48)\n"
        "  --set: calibration.sed: unknown key; did you mean 'seed'?"
    )


def test_a_flag_over_a_file_names_the_flag() -> None:
    assert message("awq-w4", {"quantize.bits": 5}) == (
        "awq-w4.yaml is not a valid recipe (1 problem)\n"
        "  --bits: quantize.bits: must be 2, 3, 4 or 8 (got 5)"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x", "--set x: must be key=value"),
        ("=3", "--set =3: must be key=value"),
        ("version.x=3", "--set: version has no keys of its own"),
        ("quantize.bits=[", "--set quantize.bits:1:2: not valid YAML"),
    ],
)
def test_a_wrong_set_is_explained(text: str, said: str) -> None:
    assert message("awq-w4", {}, [text]).startswith(said)


@pytest.mark.parametrize("name", builtin())
def test_a_builtin_recipe_is_valid_says_what_it_is_for_and_survives_yaml(name: str) -> None:
    recipe = build_recipe(name)
    assert builtin()[name].endswith(".")
    data, _ = parse_mapping(to_yaml(recipe), "x.yaml")
    assert Recipe.model_validate(data) == recipe
    first = name.split("-")[0]  # a method, or what the recipe is for
    if first in METHODS:
        assert name.startswith(f"{recipe.quantize.method}-w{recipe.quantize.bits}")
    elif first in PRUNINGS:
        assert first == recipe.prune.method
    elif sections(recipe) == ("pack",):
        assert name == recipe.pack.layout


@given(
    st.builds(
        Awq,
        method=st.just("awq"),
        bits=st.sampled_from([2, 3, 4, 8]),
        group_size=st.sampled_from(["auto", -1, 16, 256]),
        ignore=st.lists(st.sampled_from(["lm_head", "re:.*x", "null", "3", "off"])).map(tuple),
        duo=st.sampled_from(["both", True, False]),
        damping=st.floats(min_value=1e-300, max_value=0.99),
    )
)
def test_to_yaml_loses_nothing(section: Awq) -> None:
    recipe = Recipe(version=1, model="3", quantize=section)
    data, _ = parse_mapping(to_yaml(recipe), "x.yaml")
    assert Recipe.model_validate(data) == recipe
