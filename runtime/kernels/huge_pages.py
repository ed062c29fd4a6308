"""Pages of 2 MB under large weights, where Linux gives them."""

import ctypes
import math
import sys
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from optim.runtime.kernels.door import address

MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25  # of Linux's madvise
HUGE_PAGE = 1 << 21
SLAB = 1 << 24
LINE = 64


class _Slab:
    """Memory on large pages for weights that are smaller than one."""

    def __init__(self) -> None:
        self._left = torch.empty(0, dtype=torch.uint8)

    def take(self, nbytes: int) -> Tensor:
        """The next `nbytes`, from a cache line on."""
        if self._left.numel() < nbytes:
            self._left = torch.empty(SLAB, dtype=torch.uint8)
            use_huge_pages(self._left)
        taken, self._left = self._left[:nbytes], self._left[-(-nbytes // LINE) * LINE :]
        return taken


_SLAB = _Slab()


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A CPU tensor for weights, on large pages where Linux gives them; small ones share a page."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < HUGE_PAGE:
        return _SLAB.take(nbytes).view(dtype).view(shape)
    made = torch.empty(shape, dtype=dtype)
    use_huge_pages(made)  # before it is written: its pages come as large ones
    return made


def use_huge_pages(tensor: Tensor) -> None:
    """Ask for large pages under a contiguous CPU tensor: it is read a fifth faster. No promise."""
    if sys.platform != "linux" or not (tensor.is_cpu and tensor.is_contiguous()):
        return
    start = address(tensor, tensor.dtype, tensor.numel())
    first = -(-start // HUGE_PAGE) * HUGE_PAGE
    size = (start + tensor.nbytes) // HUGE_PAGE * HUGE_PAGE - first
    if size <= 0:
        return
    with suppress(OSError, AttributeError):
        advise = ctypes.CDLL(None).madvise
        for advice in (MADV_HUGEPAGE, MADV_COLLAPSE):
            advise(ctypes.c_void_p(first), ctypes.c_size_t(size), advice)
