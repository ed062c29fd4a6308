"""Every kind of linear that a checkpoint can hold. Adding a format is a file here and one row."""

from optim.runtime.decoder.linears.base import Kind
from optim.runtime.decoder.linears.bf12 import PlaneLinear
from optim.runtime.decoder.linears.dense import DenseLinear
from optim.runtime.decoder.linears.pack_quantized import PackedLinear
from optim.runtime.decoder.linears.static_int import StepLinear

# The first that claims some linears computes them; the last takes what is left.
LINEARS: tuple[Kind, ...] = (StepLinear, PackedLinear, PlaneLinear, DenseLinear)
