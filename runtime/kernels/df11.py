"""DFloat11's exponent stream: in C where there is a compiler, else in numba."""

from types import ModuleType

from optim.runtime.kernels.cpu import df11


def codec() -> ModuleType:
    """`df11`, or `numba_df11` where there is no C compiler."""
    if df11.usable():
        return df11
    from optim.runtime.kernels.cpu import numba_df11

    return numba_df11
