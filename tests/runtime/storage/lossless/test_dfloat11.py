"""DFloat11: our writer against our reader, and both against an independent encoder's tensors."""

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from optim.recipes.errors import OptimError
from optim.runtime.formats.dfloat11 import CHILD, SUFFIXES
from optim.runtime.storage.lossless import dfloat11_encoder
from optim.runtime.storage.lossless.dfloat11 import walk_of
from optim.runtime.storage.lossless.dfloat11_encoder import Counts, encode
from optim.runtime.storage.lossless.huffman import Code, code_of

SAFE = 240 << 7  # the first pattern that DFloat11 cannot hold, signs apart
shared = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60
)


def tensor_of(patterns: list[int]) -> Tensor:
    """bf16 from 16-bit patterns, those that cannot be held wrapped into those that can."""
    words = np.array([(p & 0x8000) | (p & 0x7FFF) % SAFE for p in patterns], np.uint16)
    return torch.from_numpy(words.view(np.int16)).view(torch.bfloat16)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.int16), b.reshape(-1).view(torch.int16))


@shared
@given(st.lists(st.integers(0, 0xFFFF), min_size=1, max_size=600))
def test_any_patterns_come_back(codec: ModuleType, open_unit, patterns: list[int]) -> None:
    weights = tensor_of(patterns)
    assert same(open_unit(encode([weights])).decode(0, len(patterns)), weights)


def test_every_pattern_it_can_hold(codec: ModuleType, open_unit) -> None:
    weights = tensor_of([p for p in range(1 << 16) if (p & 0x7FFF) < SAFE])
    assert len(weights) == 2 * SAFE
    assert same(open_unit(encode([weights])).decode(0, len(weights)), weights)


# One value gives codes of one bit: 64, 32768 and 65536 weights end a window, a block, two blocks.
SIZES = [1, 2, 7, 8, 9, 63, 64, 65, 32767, 32768, 32769, 65535, 65536, 65537]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("value", [0.0, -1.5, 1e-39])
def test_one_value_around_every_boundary(codec: ModuleType, open_unit, size, value) -> None:
    weights = torch.full((size,), value).to(torch.bfloat16)
    made = encode([weights])
    unit = open_unit(made)
    assert same(unit.decode(0, size), weights)
    assert made["encoded_exponent"].numel() == -(-size // 8)


@pytest.mark.parametrize("size", [12_000, 12_400, 24_700, 49_500, 50_001])
def test_parts_and_several_tensors(codec: ModuleType, open_unit, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    sizes = [size, 1, 3, size // 2]
    parts = [torch.randn(n, generator=generator).mul(0.02).to(torch.bfloat16) for n in sizes]
    unit, whole = open_unit(encode(parts)), torch.cat(parts)
    assert unit.splits == [0, size, size + 1, size + 4, size + 4 + size // 2]
    for first, count in ((0, unit.size), (1, 1), (size - 1, 3), (size // 3, size), (unit.size, 0)):
        assert same(unit.decode(first, count), whole[first : first + count])


def test_both_codecs_write_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    from optim.runtime.kernels.cpu import df11, numba_df11

    if not df11.usable():
        pytest.skip("no C compiler")
    weights = torch.randn(70_001, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    made = []
    for kernel in (df11, numba_df11):
        monkeypatch.setattr(dfloat11_encoder, "codec", lambda kernel=kernel: kernel)
        made.append(encode([weights[:50_000], weights[50_000:]]))
    assert all(torch.equal(made[0][suffix], made[1][suffix]) for suffix in SUFFIXES)


def test_an_independent_encoder_is_read_and_matched(codec: ModuleType, open_unit, data: Path):
    stored = load_file(data / "independent.safetensors")
    theirs = {k.removeprefix("unit."): t for k, t in stored.items() if k.startswith("unit.")}
    originals = [stored[f"original.{n}.weight"].view(torch.bfloat16) for n in "abc"]
    unit = open_unit(theirs)
    assert unit.blocks > 1
    assert same(unit.decode(0, unit.size), torch.cat([t.reshape(-1) for t in originals]))
    ours = encode(originals)
    for suffix in SUFFIXES:
        if suffix != "luts":  # theirs fills the slots that no code uses
            assert torch.equal(ours[suffix], theirs[suffix]), suffix
    assert torch.equal(ours["luts"][-1], theirs["luts"][-1])
    counts = Counts()
    counts.add(torch.cat([t.reshape(-1) for t in originals]))
    check_walk(code_of(counts.exponents), walk_of(theirs["luts"].numpy(), "unit"))


def leads_to(walk: np.ndarray, word: str) -> tuple[int, int]:
    """What the tables make of a code, zeros behind it: exponent, length."""
    entry, padded = CHILD, word + "0" * 8
    for at in range(0, len(word), 8):
        entry = int(walk[entry & ~CHILD, int(padded[at : at + 8], 2)])
    return entry & 0xFF, entry >> 8


def fibonacci(n: int) -> list[int]:
    numbers = [1, 1]
    while len(numbers) < n:
        numbers.append(numbers[-1] + numbers[-2])
    return numbers


@pytest.mark.parametrize("present", [1, 2, 30, 33, 60, 85])
def test_the_longest_code_has_32_bits_at_most(present: int) -> None:
    counts = np.zeros(256, np.int64)
    counts[100 : 100 + present] = fibonacci(present)[:present]
    check_code(counts)


@settings(shared, max_examples=6)
@given(st.lists(st.integers(0, 60), min_size=240, max_size=240))
def test_the_tables_hold_any_code(powers: list[int]) -> None:
    counts = np.zeros(256, np.int64)
    counts[:240] = [1 << p if p else 0 for p in powers]
    counts[7] += 1
    check_code(np.minimum(counts, 1 << 54))


def check_code(counts: np.ndarray) -> None:
    code = code_of(counts)
    present = np.flatnonzero(counts)
    assert (np.flatnonzero(code.lengths) == present).all()
    assert code.lengths[present].min() >= 1 and code.lengths.max() <= 32
    kraft = sum(2.0 ** -int(n) for n in code.lengths[present]) + 2.0 ** -len(code.end)
    assert kraft == 1
    assert len(code.luts) <= 18
    check_walk(code, walk_of(code.luts, "unit"))


def check_walk(code: Code, walk: np.ndarray) -> None:
    """Every code leads to its exponent."""
    for exponent in np.flatnonzero(code.lengths):
        word = f"{code.codes[exponent]:0{code.lengths[exponent]}b}"
        assert leads_to(walk, word) == (exponent, code.lengths[exponent])


def test_what_cannot_be_held_is_counted() -> None:
    counts = Counts()
    counts.add(torch.tensor([1.0, 2.0**112], dtype=torch.bfloat16))
    assert not counts.unfit
    for value in (2.0**113, float("inf"), float("nan"), -3e38):
        counts = Counts()
        counts.add(torch.tensor([1.0, value], dtype=torch.bfloat16))
        assert counts.unfit and counts.size == 2


def test_the_size_is_near_the_entropy(open_unit) -> None:
    weights = torch.randn(400_000, generator=torch.Generator().manual_seed(3)).mul(0.02)
    made, counts = encode([weights.to(torch.bfloat16)]), Counts()
    counts.add(weights.to(torch.bfloat16))
    bits = 8 * sum(tensor.nbytes for tensor in made.values()) / weights.numel()
    assert counts.limit() < bits < 1.03 * counts.limit() and bits < 10.85


BAD = {
    "a truncated stream": lambda t: t | {"encoded_exponent": t["encoded_exponent"][:-4096]},
    "gaps too short": lambda t: t | {"gaps": t["gaps"][:-320]},
    "no luts": lambda t: {k: v for k, v in t.items() if k != "luts"},
    "luts of one row": lambda t: t | {"luts": t["luts"][:1]},
    "too many rows": lambda t: t | {"luts": t["luts"][:1].repeat(19, 1)},
    "positions that fall": lambda t: t | {"output_positions": swapped(t["output_positions"])},
    "positions too few": lambda t: t | {"output_positions": t["output_positions"][:8]},
    "the last position wrong": lambda t: t | {"sign_mantissa": t["sign_mantissa"][:-1]},
    "splits that fall": lambda t: t | {"split_positions": t["split_positions"].flip(0)},
    "a split at the end": lambda t: t | {"split_positions": t["split_positions"] + 39_990},
    "gaps as floats": lambda t: t | {"gaps": t["gaps"].float()},
    "a pointer out of range": lambda t: t | {"luts": pointing(t["luts"], 200)},
}


def swapped(positions: Tensor) -> Tensor:
    words = positions.clone().view(-1, 4)
    words[[1, 2]] = words[[2, 1]]
    return words.view(-1)


def pointing(luts: Tensor, row: int) -> Tensor:
    made = luts.clone()
    made[0, 255] = 256 - 12
    return made


@pytest.fixture(scope="module")
def good() -> dict[str, Tensor]:
    weights = torch.randn(40_000, generator=torch.Generator().manual_seed(2)).mul(0.02)
    parts = weights.to(torch.bfloat16).split([5_000, 5_000, 30_000])
    return encode(parts)


@pytest.mark.parametrize("what", BAD)
def test_an_index_that_cannot_be_true_is_refused(good, open_unit, what: str) -> None:
    with pytest.raises(OptimError, match=r"unit\.\w+ is damaged") as caught:
        open_unit(BAD[what](good))
    assert caught.value.code == 2


@shared
@given(st.integers(0, 2**32), st.sampled_from(["luts", "encoded_exponent", "gaps", "luts"]))
def test_a_flipped_bit_never_breaks_the_reader(codec, good, open_unit, at: int, piece: str) -> None:
    """It is refused, or gives as many weights as there should be; hashes tell which (lossless)."""
    damaged = dict(good) | {piece: good[piece].clone()}
    flat = damaged[piece].view(-1)
    flat[(at >> 3) % flat.numel()] ^= 1 << (at & 7)
    try:
        assert open_unit(damaged).decode(0, 40_000).numel() == 40_000
    except OptimError as error:
        assert "unit." in error.message


@pytest.mark.parametrize("row", [0, 1])
def test_tables_that_lead_in_circles_end(codec, good, open_unit, row: int) -> None:
    luts = good["luts"].clone()
    luts[row] = 256 - 1
    with pytest.raises(OptimError):
        open_unit(good | {"luts": luts}).decode(0, 40_000)
