"""Every family of the table, every published variant of its configuration: transformers' logits."""

from pathlib import Path

import pytest

from optim.runtime.storage.open import open_checkpoint

from .compare import difference
from .variants import CASES, config_of


@pytest.mark.parametrize(("family", "variant"), CASES, ids=[" · ".join(case) for case in CASES])
def test_computes_what_transformers_computes(family: str, variant: str, tmp_path: Path) -> None:
    assert difference(config_of(family, variant), tmp_path) < 1e-4
    assert not open_checkpoint(str(tmp_path)).left_out  # the gate asks for all there is
