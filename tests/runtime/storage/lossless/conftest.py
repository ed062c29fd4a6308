"""A unit in memory, read as it would be from a file; and small models to pack."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from optim.runtime.kernels import bf12
from optim.runtime.kernels.compile import NoKernel
from optim.runtime.kernels.cpu import bf12 as cpu_bf12
from optim.runtime.kernels.cpu import df11, numba_bf12, numba_df11
from optim.runtime.storage.lossless import dfloat11, dfloat11_encoder
from optim.runtime.storage.lossless.dfloat11 import Unit
from optim.runtime.storage.tensors import TensorInfo

OpenUnit = Callable[[Mapping[str, Tensor]], Unit]


@pytest.fixture(autouse=True)
def _alone(one_thread: None) -> None:
    pass


@pytest.fixture(scope="session")
def open_unit() -> OpenUnit:
    """open_unit(tensors by suffix) -> the reader over them."""

    def make(tensors: Mapping[str, Tensor]) -> Unit:
        infos = {k: TensorInfo(tuple(t.shape), t.dtype, t.nbytes) for k, t in tensors.items()}

        def read(piece: str, start: int, stop: int) -> np.ndarray:
            return tensors[piece].reshape(-1).view(torch.uint8)[start:stop].numpy()

        return Unit("unit", infos, read)

    return make


@pytest.fixture(params=["c", "numba"])
def codec(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Either implementation of the codecs."""
    chosen = {"c": (df11, cpu_bf12), "numba": (numba_df11, numba_bf12)}[request.param]
    try:
        df11.load()
    except NoKernel as reason:
        if request.param == "c":
            pytest.skip(str(reason))
    for module in (dfloat11, dfloat11_encoder):
        monkeypatch.setattr(module, "codec", lambda: chosen[0])
    monkeypatch.setattr(bf12, "codec", lambda: chosen[1])
    return chosen[0]


@pytest.fixture(scope="session")
def data() -> Path:
    return Path(__file__).parent / "data"
