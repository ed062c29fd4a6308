"""DFloat11's exponent stream: in C where there is a compiler, else in numba."""

from types import ModuleType

from optim.runtime.kernels import cpu_df11


def codec() -> ModuleType:
    """`cpu_df11`, or `numba_df11` where there is no C compiler."""
    if cpu_df11.usable():
        return cpu_df11
    from optim.runtime.kernels import numba_df11

    return numba_df11
