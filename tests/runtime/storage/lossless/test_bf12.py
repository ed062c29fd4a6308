"""bf12: planes of any matrix come back bit for bit, whichever codec makes and reads them."""

from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from optim.recipes.errors import OptimError
from optim.runtime.formats.bf12 import PIECES, width
from optim.runtime.kernels.bf12 import Splitter, count, planes_of
from optim.runtime.storage.lossless.bf12 import Matrix
from optim.runtime.storage.tensors import TensorInfo

shared = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60
)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


def patterned(rows: int, cols: int, seed: int) -> Tensor:
    """Any 16-bit patterns: mostly escapes."""
    words = np.random.default_rng(seed).integers(0, 1 << 16, (rows, cols), np.uint16)
    return torch.from_numpy(words.view(np.int16)).view(torch.bfloat16)


@shared
@given(st.integers(1, 9), st.integers(1, 200), st.integers(0, 99), st.booleans())
def test_any_matrix_comes_back(codec: ModuleType, rows, cols, seed, normal) -> None:
    weight = patterned(rows, cols, seed)
    if normal:
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(rows, cols, generator=generator).to(torch.bfloat16)
    planes = planes_of(weight)
    assert same(planes[:], weight)
    assert same(planes[rows // 2 : rows], weight[rows // 2 :])


def test_all_patterns(codec: ModuleType) -> None:
    words = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    weight = torch.from_numpy(words.view(np.int16)).view(torch.bfloat16)
    assert same(planes_of(weight)[:], weight)


@pytest.mark.parametrize("cols", [1, 2, 63, 64, 65, 96, 128, 576])
def test_the_layout(codec: ModuleType, cols: int) -> None:
    weight = torch.randn(3, cols, generator=torch.Generator().manual_seed(cols)).to(torch.bfloat16)
    planes, words = planes_of(weight), weight.view(torch.int16).numpy().view(np.uint16)
    assert planes.high.shape == (3, width(cols))
    assert (planes.low == (words & 0xFF)).all()
    names = np.zeros((3, cols), int)
    for start in range(0, cols, 64):
        size = min(64, cols - start)
        half = (size + 1) // 2
        part = planes.high[:, start // 2 : start // 2 + half]
        names[:, start : start + half] = part & 15
        names[:, start + half : start + size] = (part >> 4)[:, : size - half]
    high = planes.palette[names].reshape(-1)
    high[planes.at] = planes.escaped
    assert (high == (words >> 8).reshape(-1)).all()


def test_twelve_bits_and_hardly_more() -> None:
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)).mul(0.02)
    planes = planes_of(weight.to(torch.bfloat16))
    stored = sum(getattr(planes, piece).nbytes for piece in PIECES)
    assert 12 < 8 * stored / weight.numel() < 12.03


def stored(weight: Tensor) -> dict[str, np.ndarray]:
    high = np.zeros(256, np.int64)
    count(weight, high)
    splitter = Splitter(high, tuple(weight.shape))
    first, second = splitter.push(weight[:1]), splitter.push(weight[1:])
    return {k: np.concatenate([first[k], second[k]]) for k in first} | splitter.finish()


def open_matrix(pieces: dict[str, np.ndarray]) -> Matrix:
    infos = {
        k: TensorInfo(a.shape, torch.int32 if k == "at" else torch.uint8, a.nbytes)
        for k, a in pieces.items()
    }
    return Matrix(
        "m.weight", infos, lambda k, a, b: pieces[k].reshape(-1).view(np.uint8)[a:b].copy()
    )


def test_a_stored_matrix_is_read_in_parts(codec: ModuleType) -> None:
    weight = torch.randn(9, 130, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    weight[4, 7] = float("nan")
    weight[8, 129] = 1e38
    matrix = open_matrix(stored(weight))
    flat = weight.view(-1)
    for first, size in ((0, 1170), (1, 1), (129, 2), (500, 300), (1169, 1)):
        assert same(matrix.decode(first, size), flat[first : first + size])


BAD = {
    "high too short": lambda p: p | {"high": p["high"][:, :-1]},
    "no palette": lambda p: {k: v for k, v in p.items() if k != "palette"},
    "a palette of 15": lambda p: p | {"palette": p["palette"][:15]},
    "more escapes than places": lambda p: p | {"escaped": np.append(p["escaped"], p["escaped"][0])},
    "escapes that fall": lambda p: p | {"at": p["at"][::-1].copy()},
    "an escape outside": lambda p: p | {"at": p["at"] + np.int32(100_000)},
    "an escape before": lambda p: p | {"at": p["at"] - np.int32(100_000)},
    "empty": lambda p: p | {"low": p["low"][:0]},
}


@pytest.mark.parametrize("what", BAD)
def test_planes_that_cannot_be_true_are_refused(what: str) -> None:
    weight = torch.randn(20, 300, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    odd = [float("inf"), -float("inf"), 1e30, -1e30, 1e-30, -1e-30, 1e10, -1e10]
    weight[3, : len(odd)] = torch.tensor(odd)
    pieces = stored(weight)
    assert len(pieces["at"]) >= 2
    with pytest.raises(OptimError, match=r"m\.weight\.bf12_\w+ is damaged"):
        open_matrix(BAD[what](pieces))
