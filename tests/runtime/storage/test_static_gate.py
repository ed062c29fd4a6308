"""Static integers whose configuration, or what lies beside them, does not belong to them."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.engine.load import load_model
from optim.runtime.measure.quality import evaluate_windows
from optim.runtime.sparsity.side_file import SIDE, read_side
from optim.runtime.storage.open import open_checkpoint

ARTIFACTS = Path(__file__).parents[2] / "data" / "artifacts"


@pytest.fixture
def static(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ARTIFACTS / "static", tmp_path / "static"))


def test_a_prefix_beyond_the_vocabulary_is_refused(static: Path) -> None:
    path = static / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["prefix"] = [1, config["vocab_size"]]
    path.write_text(json.dumps(config))
    with pytest.raises(OptimError, match=f"token {config['vocab_size']}, of") as caught:
        open_checkpoint(str(static))
    assert caught.value.code == USAGE


def test_a_side_file_beside_static_integers_is_refused(static: Path) -> None:
    shutil.copy(ARTIFACTS / "threshold" / SIDE, static)
    model = open_checkpoint(str(static))
    with pytest.raises(OptimError, match="beside static integers") as caught:
        read_side(model)
    assert caught.value.code == USAGE and "delete" in (caught.value.fix or "")
    with pytest.raises(OptimError, match="beside static integers"):
        load_model(str(static), device="cpu")
    with pytest.raises(OptimError, match="beside static integers"):
        evaluate_windows([model], None, torch.zeros(1, 8, dtype=torch.int64), "cpu")
