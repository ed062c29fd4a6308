"""What a plan says of a source that is integers already."""

from pathlib import Path

import pytest

from optim.quant.plan import plan
from optim.quant.run import quantize
from optim.recipes.schema import Recipe


def test_a_gguf_source_is_told_of(tmp_path: Path) -> None:
    section = {"method": "rtn", "bits": 4}
    recipe = {"version": 1, "model": "demo", "output": str(tmp_path / "out"), "quantize": section}
    made = plan(Recipe.model_validate(recipe), device="cpu")
    assert 96e6 < made.source_bytes < 97e6  # as in the file, not as bf16
    text = "\n".join(made.notes)
    assert "already 5.7 bits a weight (Q4_1, Q8_0)" in text
    assert "larger than the source's 97 MB" in text
    formats = {row.format for row in made.groups}
    assert formats == {"bf16", "4-bit g64 asym"}  # what is written


def test_floats_are_not(make_model: object, tmp_path: Path) -> None:
    folder = make_model("llama")  # type: ignore[operator]
    section = {"method": "rtn", "bits": 4, "group_size": 32}
    recipe = {"version": 1, "model": str(folder), "output": str(tmp_path / "out")}
    made = plan(Recipe.model_validate(recipe | {"quantize": section}), device="cpu")
    assert made.notes == ()


@pytest.mark.parametrize("sym", [True, False])
def test_a_card_says_whether_transformers_loads_a_mixture(
    make_model: object, tmp_path: Path, sym: bool
) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_model("mixtral")  # type: ignore[operator]
    section = {"method": "rtn", "bits": 4, "group_size": 32, "sym": sym}
    out = tmp_path / "out"
    recipe = {"version": 1, "model": str(folder), "output": str(out), "quantize": section}
    made = plan(Recipe.model_validate(recipe), device="cpu")
    quantize(made, lambda at, total, text: None)
    card = (out / "README.md").read_text(encoding="utf-8")
    refused = "transformers does not load experts with zero points" in card
    assert refused == ("experts with zero points" in " ".join(made.notes)) == (not sym)
    if refused:
        with pytest.raises(Exception, match=r"\w"):
            AutoModelForCausalLM.from_pretrained(out)
    else:
        AutoModelForCausalLM.from_pretrained(out)
