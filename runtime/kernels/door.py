"""The one door to kernels: a tensor goes through it before C or Triton reads or writes its memory.

A kernel knows no shapes: it reads as many elements as it is told. Whoever calls one says here what
it will touch, and a tensor that is anything else is refused, not read. What a user did wrong is
said long before; a `WrongTensor` is a mistake in this package.
"""

import ctypes
from collections.abc import Container
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]


class WrongTensor(Exception):
    """A kernel was about to get a tensor that is not what it reads."""


def address(tensor: Tensor, dtype: torch.dtype, count: int) -> int:
    """Where the `count` elements of `tensor` lie, one after the other, for C to read or write.

    Raises WrongTensor unless it is a contiguous CPU tensor of `dtype` with just so many.
    """
    if (
        tensor.dtype is dtype
        and tensor.is_cpu
        and tensor.numel() == count
        and tensor.is_contiguous()
    ):
        return tensor.data_ptr()
    raise WrongTensor(f"a kernel reads {count} x {dtype} on cpu, got {_described(tensor)}")


def array_address(array: Array, dtype: npt.DTypeLike, count: int, *, write: bool = False) -> int:
    """`address` of a numpy array, which must be writable if C will `write` there."""
    flags = array.flags
    if (
        array.dtype == np.dtype(dtype)
        and array.size == count
        and flags.c_contiguous
        and (flags.writeable or not write)
    ):
        return array.ctypes.data
    found = f"{array.dtype} {list(array.shape)}, strides {array.strides}, {flags.writeable=}"
    raise WrongTensor(f"a kernel reads {count} x {np.dtype(dtype)}, got {found}")


FLOATS = (torch.float32, torch.float16, torch.bfloat16)
Read = tuple[Tensor, torch.dtype | Container[torch.dtype], int]
"""What a Triton kernel touches: a tensor, its dtype or one of several, how many elements."""


def check_launch(device: torch.device, *reads: Read) -> None:
    """Look at what a Triton kernel is about to touch. Raises WrongTensor.

    Each must be contiguous, on `device`, in its dtype, with just so many elements.
    """
    for tensor, dtypes, count in reads:
        known = (dtypes,) if isinstance(dtypes, torch.dtype) else dtypes
        placed = tensor.device == device and tensor.is_contiguous()
        if not placed or tensor.dtype not in known or tensor.numel() != count:
            wanted = f"{count} x {dtypes} on {device}"
            raise WrongTensor(f"a kernel reads {wanted}, got {_described(tensor)}")


def _described(tensor: Tensor) -> str:
    layout = "contiguous" if tensor.is_contiguous() else f"strides {list(tensor.stride())}"
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}, {layout}"


class Struct(ctypes.Structure):
    """A structure that C reads. `compile.library` compares its size with C's.

    What a field points to lives as long as the structure does.
    """

    NAME: ClassVar[str]
    """What C calls it."""

    def point(self, field: str, tensor: Tensor | None, dtype: torch.dtype, count: int) -> None:
        """Let `field` point to `tensor` (None: to nothing); raises as `address` does.

        A tensor that is there already has been looked at: a step points to the same ones again.
        """
        kept = self._kept()
        held, known = kept.get(field, (None, -1))
        if held is not tensor or known != count:
            setattr(self, field, None if tensor is None else address(tensor, dtype, count))
            kept[field] = tensor, count

    def point_array(self, field: str, array: Array, dtype: npt.DTypeLike, count: int) -> None:
        """The same with a numpy array that C only reads."""
        setattr(self, field, array_address(array, dtype, count))
        self._kept()[field] = array, count

    def _kept(self) -> dict[str, tuple[object, int]]:
        kept: dict[str, tuple[object, int]] = self.__dict__.setdefault("kept", {})
        return kept
