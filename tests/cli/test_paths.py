"""Every path of this machine against torch; and a kernel that is wrong in one place is seen."""

from pathlib import Path

import pytest
import torch

from optim.cli import paths
from optim.cli.small_models import NAMES, make
from optim.runtime.kernels.compile import NoKernel
from optim.runtime.kernels.cpu import w4a8

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("paths")
    make(folder)
    return folder


@pytest.fixture(scope="module")
def reference(models: Path) -> dict[str, torch.Tensor]:
    return paths._result(*paths._start(models, "torch", paths._as_here(), OPTIM_NO_C="1"))


def test_every_path_holds(models: Path, reference: dict[str, torch.Tensor]) -> None:
    proofs = list(paths._compare(paths.decode_all(models), reference))
    assert [proof for proof in proofs if not proof.holds] == []
    assert {proof.model for proof in proofs} == set(NAMES)
    assert {proof.cache for proof in proofs} == set(paths.CACHES)
    assert {proof.route for proof in proofs} >= {paths.ALONE, paths.BATCH}


def test_a_wrong_kernel_is_seen(
    models: Path, reference: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        w4a8.load()
    except NoKernel as reason:
        pytest.skip(str(reason))
    monkeypatch.setattr(paths, "NAMES", ("plain bf16", "awq 8 bit"))
    right = w4a8.Weight.__call__

    def wrong(self: w4a8.Weight, x: torch.Tensor) -> torch.Tensor:
        y = right(self, x)
        y[:, 0] = 0  # one output of a linear
        return y

    monkeypatch.setattr(w4a8.Weight, "__call__", wrong)
    proofs = list(paths._compare(paths.decode_all(models), reference))
    assert {proof.model for proof in proofs if not proof.holds} == {"awq 8 bit"}


def test_what_cannot_be_loaded_is_a_path_that_does_not_hold(
    models: Path, reference: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no / such thing")

    monkeypatch.setattr(paths, "NAMES", ("plain bf16",))
    monkeypatch.setattr("optim.runtime.engine.load.load_model", broken)
    (proof,) = paths._compare(paths.decode_all(models), reference)
    assert not proof.holds
    assert "no | such thing" in proof.problem


def test_each_level_of_instructions_is_named(
    models: Path, reference: dict[str, torch.Tensor]
) -> None:
    some = {"bf12/alone/full 16 bit": reference["bf12/alone/full 16 bit"]}
    (proof,) = paths._compare(some, reference, "avx2")
    assert proof.holds and proof.route == "alone, avx2"
