"""Artifacts made before `runtime/` was divided load as they did and give the logits they gave.

See tests/data/make_artifacts.py. Everything is computed in fp32; what differs between machines is
the order of sums, and the few 8-bit activation codes that fall the other way because of it. Without
a C compiler packed weights meet activations of 16 bits, which moves the logits by up to 4 %.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from optim.runtime.engine.load import load_model
from optim.runtime.kernels.compile import NoKernel
from optim.runtime.kernels.cpu import w4a8
from optim.runtime.sparsity.side_file import SIDE
from optim.runtime.storage.manifest import verify
from optim.runtime.storage.open import open_checkpoint

ARTIFACTS = Path(__file__).parent.parent / "data" / "artifacts"
KNOWN = load_file(ARTIFACTS / "logits.safetensors")
PROMPT = 24
NAMES = sorted(path.name for path in ARTIFACTS.iterdir() if path.is_dir())


def decoded(folder: Path, tokens: int) -> torch.Tensor:
    """fp32 `[tokens, vocabulary]`: after the maker's prompt, then token by token."""
    ids = torch.arange(PROMPT + tokens - 1)[None] * 37 % 259 + 5
    model = load_model(str(folder), device="cpu")
    cache = model.new_cache(length=64)
    found = [model.forward(ids[:, :PROMPT], cache)]
    found += [model.forward(ids[:, i : i + 1], cache) for i in range(PROMPT, ids.shape[1])]
    return torch.cat(found)


def distances(name: str, folder: Path) -> torch.Tensor:
    """How far each row of logits is from what it was, as a share of its length."""
    known = KNOWN[name]
    return (decoded(folder, len(known)) - known).norm(dim=1) / known.norm(dim=1)


@pytest.fixture
def bound(one_thread: None) -> float:
    """How far logits may be from those of the machine that made the artifacts."""
    try:
        w4a8.load()
    except NoKernel:
        return 0.08
    return 0.005


def test_every_artifact_has_its_logits() -> None:
    assert NAMES and sorted(KNOWN) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_it_gives_the_logits_it_gave(name: str, bound: float) -> None:
    folder = ARTIFACTS / name
    assert float(distances(name, folder).max()) < bound
    if open_checkpoint(str(folder)).layout is not None:
        assert verify(folder) == []


@pytest.mark.parametrize("name", ["core", "core-awq4", "gate", "threshold", "threshold-awq4"])
def test_the_bound_sees_a_side_file_that_is_not_used(
    name: str, tmp_path: Path, one_thread: None
) -> None:
    for path in (ARTIFACTS / name).iterdir():
        if path.name != SIDE:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert float(distances(name, tmp_path)[1:].min()) > 0.05
