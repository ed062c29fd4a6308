"""The mixings: orthogonal, flat, of every width that models have."""

import pytest
import torch

from optim.runtime.formats.hadamard import mixing, random_signs

FLAT = [1, 2, 64, 96, 576, 640, 1536, 2048, 2560, 4096, 8960, 13824, 14336, 18944]
ODD = [43, 45, 11008]  # no Hadamard matrix is known to these constructions: Hartley's instead


@pytest.mark.parametrize("n", [*FLAT, *ODD])
def test_orthogonal_and_inverse(n: int) -> None:
    mix = mixing(n, random_signs(n, 3))
    x = torch.randn(4, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = mix(x)
    assert torch.allclose(mix.inverse(y), x, atol=1e-12)
    assert torch.allclose(y @ y.T, x @ x.T, atol=1e-9 * n)


@pytest.mark.parametrize("n", [*FLAT, *ODD])
def test_one_channel_is_spread_over_all(n: int) -> None:
    one = torch.zeros(1, n, dtype=torch.float64)
    one[0, n // 3] = 1
    most = float(mixing(n)(one).abs().max()) * n**0.5
    assert most == pytest.approx(1.0, abs=1e-9) if n in FLAT else most < 1.42


def test_batches_and_dtypes() -> None:
    mix = mixing(576)
    x = torch.randn(2, 3, 576)
    assert mix(x).shape == x.shape and mix(x).dtype == torch.float32
    assert torch.allclose(mix(x)[1, 2], mix(x[1, 2]), atol=1e-5)


def test_signs_are_reproducible() -> None:
    assert torch.equal(random_signs(99, 5), random_signs(99, 5))
    assert not torch.equal(random_signs(99, 5), random_signs(99, 6))
