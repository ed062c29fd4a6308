"""What a dry run estimates from: products counted, and the memory and the speed of this machine."""

from collections.abc import Callable
from pathlib import Path

import torch

from optim.quant.effort import products
from optim.quant.finish import alike
from optim.quant.methods import METHODS
from optim.quant.plan import plan
from optim.recipes.schema import Recipe
from optim.runtime.system.memory import available_bytes
from optim.runtime.system.products import products_a_second

MLP, ATTENTION = "model.layers.0.mlp", "model.layers.0.self_attn"
SHAPES = {f"{MLP}.up_proj": (48, 32), f"{MLP}.down_proj": (32, 48), f"{ATTENTION}.q_proj": (32, 32)}


def counted(method: str, samples: int = 4, **keys: object) -> int:
    calibration = {"num_samples": samples, "seq_len": 16}
    section = {"method": method} | keys
    recipe = Recipe.model_validate({"version": 1, "calibration": calibration, "quantize": section})
    return products(METHODS[method], recipe, SHAPES)


def test_products_are_those_of_walking_gathering_and_solving() -> None:
    tokens, weights = 64, 48 * 32 + 32 * 48 + 32 * 32
    walked = 3 * tokens * weights
    grams = tokens * (32**2 + 48**2 + 32**2) + (32**3 + 48**3 + 32**3) / 3
    once = 48 * 32**2 + 32 * 48**2 + 32 * 32**2
    assert counted("gptq") == round(walked + grams + once)
    assert counted("awq") == round(walked + grams + once * (1 + 2 * 10))
    assert counted("awq", duo=True) == round(walked + grams + once * (1 + 10))
    assert counted("rtn") == 0


def test_twice_the_text_is_walked_twice() -> None:
    fixed = 2 * counted("awq") - counted("awq", samples=8)
    assert counted("awq", samples=16) == 4 * counted("awq") - 3 * fixed
    assert counted("awq", guide="loss") > 1.5 * counted("gptq")


def test_a_plan_knows_them(make_model: Callable[..., Path], make_recipe: Callable[..., Recipe],
                           tmp_path: Path) -> None:  # fmt: skip
    made = plan(make_recipe(make_model("llama"), tmp_path / "out"), device="cpu")
    assert made.products == made.as_dict()["products"] > 0


def test_a_speed_is_found() -> None:
    assert 1e6 < products_a_second(torch.device("cpu")) < 1e15


def test_free_memory_is_less_than_there_is() -> None:
    known = available_bytes()
    assert known is None or 0 < known < 1 << 50


def test_notes_that_say_the_same_are_one() -> None:
    notes = ["block 0: a: b", "block 1: c", "block 4: a: b"]
    assert alike(notes) == ["blocks 0, 4: a: b", "block 1: c"]
