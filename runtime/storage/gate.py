"""The gate: what a model's tensors must be, before a byte of them reaches a kernel.

For the families of the table the configuration says which modules there are and how large
(architecture/tensors.py). Each is stored in one of a few forms, and each form has its tensors:

    plain         weight                      float, the module's shape (lossless packing unpacks
                                              to this, and its stores are checked as what they give)
    packed        weight_packed, weight_scale, weight_shape, and weight_zero_point if asymmetric
                  (weight_offset in formats of others: storage/foreign/)
    static        weight_packed, weight_scale, and the steps of its input; see formats/w4a4.py

`admit` checks names, shapes and dtypes against the headers, and the few values that say how large
something else is. What it does not ask for is no part of the model and is left out.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.architecture.shape import Shape
from optim.runtime.architecture.table import Decoder
from optim.runtime.architecture.tensors import Module, modules
from optim.runtime.formats.bits import words
from optim.runtime.formats.pack_quantized import Scheme, SchemeOf
from optim.runtime.formats.static_int import SITE_PARTS
from optim.runtime.storage.tensors import TensorInfo

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
SCALES = (torch.bfloat16, torch.float16, torch.float32)
COUNTS = (torch.int64, torch.int32)
MOST_COPIES = 64  # of a channel whose step is split among several codes
FIX = "config.json and the weights do not belong together, or a file is damaged"
OVERFLOWN = "the checkpoint is damaged, or was saved after an overflow: use another copy"


@dataclass(slots=True)
class Stored:
    """The headers of a model's tensors, a way to read one, and which were asked for so far."""

    source: str
    infos: Mapping[str, TensorInfo]
    read: Callable[[str], Tensor]
    scheme_of: SchemeOf
    static: bool
    used: set[str] = field(default_factory=set)

    def has(self, name: str) -> bool:
        return name in self.infos

    def take(self, name: str, shape: tuple[int, ...], dtypes: Iterable[torch.dtype]) -> None:
        """Require the tensor `name` of `shape` and one of `dtypes`."""
        wanted = f"{' or '.join(map(_short, dtypes))} {list(shape)}"
        info = self.infos.get(name)
        if info is None:
            raise OptimError(f"{self.source} has no tensor {name}, {wanted}", FIX, USAGE)
        if info.shape != shape or info.dtype not in dtypes:
            found = f"{_short(info.dtype)} {list(info.shape[:8])}"
            raise OptimError(f"{self.source}: {name} is {found}, expected {wanted}", FIX, USAGE)
        self.used.add(name)

    def take_if(self, name: str, shape: tuple[int, ...], dtypes: Iterable[torch.dtype]) -> None:
        if self.has(name):
            self.take(name, shape, dtypes)


def admit(stored: Stored, shape: Shape, facts: Decoder) -> set[str]:
    """The names of the tensors that the model consists of.

    Raises OptimError (2) naming the first tensor that is missing or not what it must be: what was
    found and what was expected.
    """
    _bounded(stored, shape)
    widths: dict[str, int] = {}  # of the codes that a norm of static integers emits
    for module in modules(shape, facts):
        if module.kind == "norm":
            _norm(stored, module, widths)
        elif stored.has(f"{module.name}.weight_packed"):
            (_static if stored.static else _packed)(stored, module, widths)
        elif module.kind != "head" or stored.has(f"{module.name}.weight") or not shape.tied:
            _plain(stored, module, widths)
    return stored.used


def _bounded(stored: Stored, shape: Shape) -> None:
    """A configuration of more modules than there are tensors is refused before they are listed."""
    experts = sum(shape.experts for layer in shape.layers if layer.mixture)
    if len(shape.layers) + experts > len(stored.infos):
        what = f"{len(shape.layers)} blocks" + (f" and {experts} experts" if experts else "")
        found = f"{stored.source} has {len(stored.infos)} tensors"
        raise OptimError(f"config.json says {what}; {found}", FIX, USAGE)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _plain(stored: Stored, module: Module, widths: Mapping[str, int]) -> None:
    shape = module.shape
    if stored.static and module.reads is not None and module.reads in widths:
        shape = (shape[0], widths[module.reads])
    if module.weight:
        stored.take(f"{module.name}.weight", shape, FLOATS)
    if module.bias:
        stored.take(f"{module.name}.bias", module.shape[:1], FLOATS)


def _norm(stored: Stored, module: Module, widths: dict[str, int]) -> None:
    if stored.static and stored.has(f"{module.name}.gain"):
        widths[module.name] = _site(stored, f"{module.name}.", module.shape[0])
    else:
        _plain(stored, module, {})


def _packed(stored: Stored, module: Module, _widths: Mapping[str, int]) -> None:
    name, (outputs, inputs) = module.name, module.shape
    scheme = stored.scheme_of(name)
    if scheme is None:
        what = f"{stored.source}: quantization_config does not say how {name} is packed"
        raise OptimError(what, FIX, USAGE)
    groups = _groups(stored, module, scheme)
    stored.take(f"{name}.weight_packed", (outputs, words(inputs, scheme.bits)), [torch.int32])
    stored.take(f"{name}.weight_scale", (outputs, groups), SCALES)
    if scheme.offset:
        stored.take(f"{name}.weight_offset", (outputs, groups), SCALES)
    elif not scheme.symmetric:
        rows = words(outputs, scheme.bits)
        stored.take(f"{name}.weight_zero_point", (rows, groups), [torch.int32])
    stored.take(f"{name}.weight_shape", (2,), COUNTS)
    said = stored.read(f"{name}.weight_shape").tolist()
    if said != [outputs, inputs]:
        what = f"{stored.source}: {name}.weight_shape says {said}, expected {list(module.shape)}"
        raise OptimError(what, FIX, USAGE)
    if module.bias:
        stored.take(f"{name}.bias", (outputs,), FLOATS)


def _groups(stored: Stored, module: Module, scheme: Scheme) -> int:
    inputs = module.shape[1]
    if scheme.group_size > 0 and inputs % scheme.group_size:
        what = f"{module.name}: groups of {scheme.group_size} do not divide {inputs} inputs"
        raise OptimError(f"{stored.source}: {what}", FIX, USAGE)
    return scheme.groups(inputs)


def _static(stored: Stored, module: Module, widths: Mapping[str, int]) -> None:
    name, (outputs, inputs) = module.name, module.shape
    if module.reads is not None and module.reads in widths:
        columns = widths[module.reads]
    elif stored.has(f"{name}.input_clip"):
        stored.take(f"{name}.input_clip", (1,), [torch.float32])
        columns = inputs
    else:
        columns = _site(stored, f"{name}.input_", inputs)
    stored.take(f"{name}.weight_packed", (outputs, -(-columns // 2)), [torch.uint8])
    stored.take(f"{name}.weight_scale", (outputs,), [torch.float32])
    stored.take_if(f"{name}.bias", (outputs,), [torch.float32])


def _site(stored: Stored, stem: str, width: int) -> int:
    """The steps of one input of `width` channels; how many codes it emits."""
    gain = stored.infos.get(f"{stem}gain")
    split = stored.has(f"{stem}index")
    count = gain.shape[0] if split and gain is not None and len(gain.shape) == 1 else width
    if not 1 <= count <= MOST_COPIES * width:
        raise OptimError(f"{stored.source}: {stem}gain has {count} codes of {width}", FIX, USAGE)
    stored.take(f"{stem}gain", (count,), [torch.float32])
    for part in SITE_PARTS[1:]:
        kinds = COUNTS if part == "index" else (torch.float32,)
        stored.take_if(f"{stem}{part}", (count,), kinds)
    if split:
        index = stored.read(f"{stem}index")
        if int(index.min()) < 0 or int(index.max()) >= width:
            what = f"{stored.source}: {stem}index goes beyond {width} channels"
            raise OptimError(what, FIX, USAGE)
    return count


def read_finite(read: Callable[[str], Tensor], name: str) -> Tensor:
    """`read(name)`; OptimError (2), naming it, if it has NaN or infinity."""
    value = read(name)
    ends = value.aminmax() if value.dtype in FLOATS and value.numel() else ()  # NaN is both
    if not all(bool(end.isfinite()) for end in ends):
        raise OptimError(f"{name} has values that are not finite", OVERFLOWN, USAGE)
    return value
