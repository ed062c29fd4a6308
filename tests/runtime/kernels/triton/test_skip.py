"""The gathering Triton kernel: in the interpreter on odd shapes, on a card (`-m gpu`) the same."""

import pytest
import torch

from optim.runtime.formats.schemes import Scheme

g = pytest.importorskip("optim.runtime.kernels.triton.skip", exc_type=ImportError)

DEVICES = [pytest.param("cpu", id="interpreter"), pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs"), [(70, 133), (5, 40), (130, 300)])
def test_left_out_inputs_count_as_zero(
    device: str, dtype: torch.dtype, outputs: int, inputs: int
) -> None:
    generator = torch.Generator().manual_seed(inputs)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    x, bias = torch.randn(inputs, generator=generator), torch.randn(outputs, generator=generator)
    tensors = g.dense_layout(weight, bias)
    gather = g.Gather(outputs, {k: v.to(device) for k, v in tensors.items()}, 0)
    got = gather(x.to(device), 0.6).cpu()
    kept = torch.where(x.abs() > 0.6, x, 0)
    wanted = weight.double() @ kept.double() + bias
    assert float((got - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())
    assert int(gather.used) == int((kept != 0).sum())
    assert torch.equal(gather(x.to(device), 0.6).cpu(), got)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("outputs", "inputs", "group"), [(70, 128, 32), (200, 256, 128), (9, 64, 16)]
)
def test_int4(device: str, symmetric: bool, outputs: int, inputs: int, group: int) -> None:
    generator = torch.Generator().manual_seed(inputs)
    scheme = Scheme(4, group, symmetric)
    q = torch.randint(0, 16, (outputs, inputs), generator=generator).to(torch.uint8)
    scale = (torch.rand(outputs, inputs // group, generator=generator) + 0.1).bfloat16()
    zero = torch.randint(0, 16, scale.shape, generator=generator).to(torch.uint8)
    tensors = g.int4_layout(q, scale, None if symmetric else zero, scheme, None)
    gather = g.Gather(outputs, {k: v.to(device) for k, v in tensors.items()}, group)
    x = torch.randn(inputs, generator=generator)
    kept = torch.where(x.abs() > 0.5, x, 0)
    weight = gather.wide(slice(0, inputs)).cpu()
    middle = torch.full_like(scale.float(), 8) if symmetric else zero.float()
    exact = (q.float().view(outputs, -1, group) - middle[..., None]) * scale.float()[..., None]
    assert torch.equal(weight.T, exact.view(outputs, inputs))
    wanted = weight.double().T @ kept.double()
    got = gather(x.to(device), 0.5).cpu()
    assert float((got - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())
