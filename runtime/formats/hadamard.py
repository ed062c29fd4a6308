"""Orthogonal mixing of channels that costs little: Hadamard matrices of nearly every size.

A vector of n = a * b channels is laid out `[a, b]` and multiplied by a small matrix on each side,
which is the Kronecker product of the two: n (a + b) products in place of n^2. The two are made of
Sylvester's doubling [[H, H], [H, -H]] and, for the odd part of n, of Paley's constructions from the
quadratic residues of a prime (1933). Where neither gives a matrix of +-1 (11008 = 43 * 256), the
odd part takes Hartley's cos + sin: orthogonal too, and nearly as flat.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

MOST_DOUBLINGS = 8  # of the odd part, in search of a Paley matrix


@dataclass(frozen=True, slots=True, eq=False)
class Mixing:
    """The orthogonal (left x right) diag(signs) `[n, n]`; `signs` `[n]` may be absent."""

    left: Tensor
    right: Tensor
    signs: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Each row of `x` `[..., n]` times the matrix, in the dtype of x."""
        y = x if self.signs is None else x * self.signs.to(x)
        y = y.reshape(-1, self.left.shape[0], self.right.shape[0])
        y = self.left.to(x) @ (y @ self.right.T.to(x))
        return y.reshape(x.shape)

    def inverse(self, x: Tensor) -> Tensor:
        """The transpose of the matrix, which takes `__call__` back."""
        y = x.reshape(-1, self.left.shape[0], self.right.shape[0])
        y = (self.left.T.to(x) @ (y @ self.right.to(x))).reshape(x.shape)
        return y if self.signs is None else y * self.signs.to(x)

    def to(self, device: torch.device, dtype: torch.dtype) -> "Mixing":
        """The same where it will be used, so that nothing is converted there."""
        signs = None if self.signs is None else self.signs.to(device, dtype)
        return Mixing(self.left.to(device, dtype), self.right.to(device, dtype), signs)


def mixing(n: int, signs: Tensor | None = None) -> Mixing:
    """The mixing of n channels; `signs` `[n]` of +-1 makes it a randomised one."""
    left, right = _factors(n)
    return Mixing(left, right, signs)


def random_signs(n: int, seed: int) -> Tensor:
    """int8 `[n]` of +-1."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 2, (n,), generator=generator) * 2 - 1).to(torch.int8)


@cache
def _factors(n: int) -> tuple[Tensor, Tensor]:
    """Two orthogonal matrices of about the same size whose Kronecker product has size n."""
    power = n & -n
    left = _odd_part(n // power, power)
    rest = n // left.shape[0]
    while rest >= 2 * left.shape[0]:
        left, rest = torch.kron(left, _doubled(2)), rest // 2
    right = _doubled(rest)
    return left / left.square().sum(0)[0].sqrt(), right / rest**0.5


def _odd_part(odd: int, power: int) -> Tensor:
    """Columns of one length, orthogonal: of size 1 if `odd` is, else of odd * (some of power)."""
    if odd == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    size = odd
    while size <= odd * min(power, MOST_DOUBLINGS):
        for made in _paley(size):
            return made
        size *= 2
    angle = torch.arange(odd, dtype=torch.float64) * (2 * torch.pi / odd)
    angle = angle[:, None] * torch.arange(odd)
    return angle.cos() + angle.sin()


def _doubled(size: int) -> Tensor:
    """Sylvester's matrix of a power of two."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < size:
        h = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), h)
    return h


def _paley(size: int) -> Iterator[Tensor]:
    """Paley's Hadamard matrix of this size, of his first or second kind, if there is one."""
    q = size - 1
    if size % 4 == 0 and _is_prime(q) and q % 4 == 3:
        skew = _bordered(q)
        skew[1:, 0] = -1
        yield skew + torch.eye(size, dtype=torch.float64)
    q = size // 2 - 1
    if size % 4 == 0 and _is_prime(q) and q % 4 == 1:
        one = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        two = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        eye = torch.eye(q + 1, dtype=torch.float64)
        yield torch.kron(_bordered(q), one) + torch.kron(eye, two)


def _bordered(q: int) -> Tensor:
    """The residues' characters chi(i - j) with a border of ones and a corner of zero."""
    squares = {i * i % q for i in range(1, q)}
    chi = torch.tensor([0] + [1 if i in squares else -1 for i in range(1, q)], dtype=torch.float64)
    at = torch.arange(q)
    out = torch.ones(q + 1, q + 1, dtype=torch.float64)
    out[0, 0] = 0
    out[1:, 1:] = chi[(at[:, None] - at) % q]
    return out


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % i for i in range(2, int(n**0.5) + 1))
