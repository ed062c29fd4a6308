"""What `bf12.py` does but the product, in numba: for machines without a C compiler."""

from typing import Any

import numba
import numpy as np

from optim.runtime.kernels.door import Array


def count(weights: Array, high_bytes: Array) -> None:
    """Add to int64 `[256]` how often each high byte of uint16 weights comes."""
    high_bytes += np.bincount(weights.reshape(-1) >> 8, minlength=256)


def split(weights: Array, name: Array, first: int, planes: tuple[Array, ...]) -> int:
    """uint16 `[rows, cols]` into planes (low, high, at, escaped); returns the number of escapes."""
    return int(_split(weights, name, first, *planes))


def rows(planes: Any, start: int, stop: int, out: Array) -> None:
    """Rows start..stop as uint16 `[stop - start, cols]`, into `out`."""
    a, b = planes.escapes[start], planes.escapes[stop]
    part = slice(start, stop)
    _rows(planes.low[part], planes.high[part], planes.palette, out)
    at = planes.at[a:b] - np.int64(start) * planes.low.shape[1]
    flat = out.reshape(-1)
    flat[at] = (flat[at] & 0xFF) | planes.escaped[a:b].astype(np.uint16) << 8


@numba.njit(cache=True)
def _split(
    weights: Array, name: Array, first: int, low: Array, high: Array, at: Array, escaped: Array
) -> int:
    count = 0
    rows, cols = weights.shape
    for row in range(rows):
        for k in range(cols):
            w = weights[row, k]
            low[row, k] = w & 0xFF
            place = name[w >> 8]
            if place == 16:
                at[count] = first + row * cols + k
                escaped[count] = w >> 8
                count += 1
            start = k // 64 * 64
            half = (min(cols - start, 64) + 1) // 2
            j = k - start
            if j < half:
                high[row, start // 2 + j] = place & 15
            else:
                high[row, start // 2 + j - half] |= (place & 15) << 4
    return count


@numba.njit(cache=True)
def _rows(low: Array, high: Array, palette: Array, out: Array) -> None:
    rows, cols = low.shape
    for row in range(rows):
        for start in range(0, cols, 64):
            left = min(cols - start, 64)
            half = (left + 1) // 2
            for j in range(half):
                name = high[row, start // 2 + j] & 15
                out[row, start + j] = low[row, start + j] | np.uint16(palette[name]) << 8
            for j in range(half, left):
                name = high[row, start // 2 + j - half] >> 4
                out[row, start + j] = low[row, start + j] | np.uint16(palette[name]) << 8
