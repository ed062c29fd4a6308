"""Every kind of linear that a checkpoint can hold. Adding a format is a file here and one row."""

from optim.runtime.formats.packed_linear import PackedLinear
from optim.runtime.linear import DenseLinear
from optim.runtime.linear_base import Kind
from optim.runtime.plane_linear import PlaneLinear
from optim.runtime.static_linear import StepLinear

# The first that claims some linears computes them; the last takes what is left.
LINEARS: tuple[Kind, ...] = (StepLinear, PackedLinear, PlaneLinear, DenseLinear)
