"""One artifact, every level of instructions, every kind of machine: the same logits.

The bounds are those of docs/engine.md. Between levels the order of sums differs, and an activation
between two 8-bit codes may fall to either. Without a C compiler packed weights meet activations of
16 bits in place of 8.
"""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from optim.runtime.engine.load import load_model
from optim.runtime.kernels.cpu import step
from optim.runtime.system import instructions

ARTIFACTS = Path(__file__).parent.parent / "data" / "artifacts"
KNOWN = load_file(ARTIFACTS / "logits.safetensors")
KINDS = (
    *("awq4", "awq4-sym", "awq3", "awq8-sym", "awq4-mixture", "awq4-bf12", "bf12", "df11"),
    *("static", "static-literal", "threshold", "threshold-awq4", "gate", "core", "core-awq4"),
    "relu-exact",
)
LEVELS, NO_C = 5e-3, 8e-2
HALVES = 1e-3  # keys and values are kept in fp16
PROMPT = 24
pytestmark = pytest.mark.usefixtures("one_thread")


def decoded(folder: str, tokens: int = 3) -> torch.Tensor:
    """fp32 `[tokens, vocabulary]`: after a prompt, then token by token."""
    ids = torch.arange(PROMPT + tokens - 1)[None] * 37 % 259 + 5
    model = load_model(folder, device="cpu")
    cache = model.new_cache(length=64)
    found = [model.forward(ids[:, :PROMPT], cache)]
    found += [model.forward(ids[:, i : i + 1], cache) for i in range(PROMPT, ids.shape[1])]
    return torch.cat(found)


def distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest distance of a row, as a share of its length."""
    return float(((got - wanted).norm(dim=1) / wanted.norm(dim=1)).max())


@pytest.fixture(scope="module")
def of_levels() -> dict[str, torch.Tensor]:
    """What the levels gave so far, by kind."""
    return {}


@pytest.mark.skipif(not step.usable(), reason="no C compiler")
@pytest.mark.parametrize("name", KINDS)
def test_every_level(isa: str, name: str, of_levels: dict[str, torch.Tensor]) -> None:
    assert os.environ["OPTIM_ISA"] == isa and step.usable()
    got = decoded(str(ARTIFACTS / name), len(KNOWN[name]))
    assert distance(got, KNOWN[name]) < LEVELS
    assert distance(got, of_levels.setdefault(name, got)) < LEVELS


@pytest.mark.skipif(not step.usable(), reason="no C compiler")
def test_every_level_of_a_plain_model(isa: str, plain: tuple[str, torch.Tensor]) -> None:
    folder, wanted = plain
    assert distance(decoded(folder), wanted) < HALVES


@pytest.fixture(scope="module")
def plain(make_model) -> tuple[str, torch.Tensor]:  # type: ignore[no-untyped-def]
    """A bf16 checkpoint and its logits by transformers, in fp32."""
    import transformers

    folder = make_model("llama")
    ids = torch.arange(PROMPT + 2)[None] * 37 % 259 + 5
    judge = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return str(folder), judge(ids).logits[0, PROMPT - 1 :]


MACHINES = {
    "no compiler": ("OPTIM_NO_C", "1"),
    "bf16 units": ("features", {"avx512_bf16"}),
    "no bf16 units": ("features", set()),
    "one core": ("cores", 1),
}


@pytest.mark.parametrize("trait", MACHINES)
@pytest.mark.parametrize("name", ["awq4", "bf12", "static", "threshold-awq4", "core", "relu-exact"])
def test_every_machine(trait: str, name: str, another_machine: pytest.MonkeyPatch) -> None:
    kind, value = MACHINES[trait]
    if kind == "features":
        there = instructions.features() - {"avx512_bf16", "amx_bf16"}
        another_machine.setattr(instructions, "features", lambda: there | value)
        assert instructions.has_bf16_units() == bool(value)
    elif kind == "cores":
        another_machine.setattr(os, "cpu_count", lambda: value)
        another_machine.setattr(os, "sched_getaffinity", lambda _: {0})
    else:
        another_machine.setenv(kind, str(value))
        assert not step.usable()
    bound = LEVELS if step.usable() else NO_C
    assert distance(decoded(str(ARTIFACTS / name), len(KNOWN[name])), KNOWN[name]) < bound
