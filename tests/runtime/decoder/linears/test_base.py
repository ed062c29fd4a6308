"""What every kind of linear answers: some outputs, some inputs, bytes; and those around others."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from optim.runtime.decoder.linears.base import Joined, Linear, MaskedLinear, Picked, Spread, masked
from optim.runtime.decoder.linears.bf12 import PlaneLinear, runs_here
from optim.runtime.decoder.linears.dense import DenseLinear
from optim.runtime.decoder.linears.pack_quantized import PackedLinear
from optim.runtime.decoder.linears.sparse import SparseLinear
from optim.runtime.formats.pack_quantized import pack
from optim.runtime.formats.schemes import Scheme
from optim.runtime.kernels.cpu import skip_dense, skip_int4
from optim.runtime.kernels.cpu.skip_int4 import NOTHING

OUTPUTS, INPUTS = 72, 96
SCHEME = Scheme(4, 32, False)
ROWS, COLUMNS = torch.tensor([0, 3, 5, 40, 71]), torch.arange(0, 64, 3)


def weight() -> Tensor:
    return torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(0))


def packed() -> PackedLinear:
    generator = torch.Generator().manual_seed(1)
    q = torch.randint(0, 16, (OUTPUTS, INPUTS), generator=generator).to(torch.uint8)
    zero = torch.randint(0, 16, (OUTPUTS, 3), generator=generator).to(torch.uint8)
    scale = (torch.rand(OUTPUTS, 3, generator=generator) * 0.1).bfloat16()
    return PackedLinear(pack(q, scale, zero, SCHEME), SCHEME, torch.ones(OUTPUTS))


def skipping_dense() -> SparseLinear:
    if not skip_dense.usable():
        pytest.skip("no kernel that skips inputs here")
    return SparseLinear(skip_dense.linear(weight(), torch.ones(OUTPUTS)), NOTHING)


def skipping_packed() -> SparseLinear:
    if not skip_int4.usable():
        pytest.skip("no kernel that skips inputs here")
    made = packed().by_input(NOTHING)
    assert made is not None
    return made


def planes() -> PlaneLinear:
    if not runs_here(torch.device("cpu")):
        pytest.skip("no kernel that reads planes here")
    return PlaneLinear(weight().bfloat16(), torch.ones(OUTPUTS))


KINDS: dict[str, Callable[[], Linear]] = {
    "dense": lambda: DenseLinear(weight(), torch.ones(OUTPUTS)),
    "dense without a bias": lambda: DenseLinear(weight()),
    "packed": lambda: packed().prepare(),
    "planes": planes,
    "skipping": skipping_dense,
    "skipping, packed": skipping_packed,
    "masked": lambda: MaskedLinear(packed().prepare(), NOTHING),
    "joined": lambda: Joined([DenseLinear(weight()[:40]), DenseLinear(weight()[40:])]),
}


@pytest.fixture(params=KINDS)
def linear(request: pytest.FixtureRequest) -> Linear:
    return KINDS[request.param]()


def x(tokens: int = 1) -> Tensor:
    return torch.randn(1, tokens, INPUTS, generator=torch.Generator().manual_seed(2))


def close(got: Tensor, wanted: Tensor) -> bool:
    """Integers of 8 bits are rounded by groups of other inputs: a few thousandths."""
    return bool((got - wanted).norm() < 0.02 * wanted.norm())


def test_its_sizes_are_those_of_its_weight(linear: Linear) -> None:
    assert (linear.out_features, linear.in_features) == (OUTPUTS, INPUTS)
    assert linear(x(3)).shape == (1, 3, OUTPUTS)
    assert linear.nbytes > 0 and linear.skipped_bytes == 0


@pytest.mark.parametrize("tokens", [1, 3])
def test_some_outputs(linear: Linear, tokens: int) -> None:
    some = linear.with_outputs(ROWS)
    assert (some.out_features, some.in_features) == (len(ROWS), INPUTS)
    assert close(some(x(tokens)), linear(x(tokens))[..., ROWS])


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("shift", [None, torch.linspace(0, 1, OUTPUTS)])
def test_some_inputs(linear: Linear, tokens: int, shift: Tensor | None) -> None:
    """The other inputs count as zero, the last of all among them; the bias stays."""
    some = linear.with_inputs(COLUMNS, shift)
    assert (some.out_features, some.in_features) == (OUTPUTS, len(COLUMNS))
    whole = torch.zeros(1, tokens, INPUTS)
    whole[..., COLUMNS] = x(tokens)[..., COLUMNS]
    wanted = linear(whole) + (0 if shift is None else shift)
    assert close(some(x(tokens)[..., COLUMNS]), wanted)


def test_what_is_gathered_reads_less() -> None:
    assert DenseLinear(weight()).with_outputs(ROWS).nbytes == len(ROWS) * INPUTS * 4
    assert DenseLinear(weight()).with_inputs(COLUMNS).nbytes == OUTPUTS * len(COLUMNS) * 4
    kept = PlaneLinear(weight().bfloat16())
    assert isinstance(kept.with_outputs(ROWS), Picked)
    assert isinstance(kept.with_inputs(COLUMNS), Spread)
    assert kept.with_outputs(ROWS).nbytes == kept.nbytes


def test_a_mask_leaves_out_small_inputs_of_one_token() -> None:
    linear = DenseLinear(weight())
    one, three = x(1), x(3)
    kept = torch.where(one.abs() <= 0.5, 0, one)
    assert torch.equal(MaskedLinear(linear, 0.5)(one), linear(kept))
    assert torch.equal(MaskedLinear(linear, 0.5)(three), linear(three))
    assert not MaskedLinear(linear, 0.5).recordable and linear.recordable
    assert masked(linear, None) is linear and masked(linear, NOTHING) is linear


def test_joined_answers_for_its_parts() -> None:
    parts = [DenseLinear(weight()[:40]), MaskedLinear(DenseLinear(weight()[40:]), 0.5)]
    whole = Joined(parts)
    assert whole.nbytes == OUTPUTS * INPUTS * 4 and not whole.recordable
    assert Joined(parts[:1]).recordable
    assert whole.c_reader is None and whole.table is None


def test_the_c_step_reads_a_masked_linear_with_its_threshold() -> None:
    reader = MaskedLinear(packed().prepare(), 0.25).c_reader
    plain = packed().prepare().c_reader
    if plain is None:
        pytest.skip("no kernel that the C step calls here")
    assert plain.threshold == NOTHING
    assert reader is not None and reader.threshold == 0.25
