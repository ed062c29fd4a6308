"""An artifact as the plain model it stands for: packed linears read back as dense weights.

What evaluation walks over: the same tensors for every format, one definition of what they mean.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optim.runtime.formats.bits import unpack_rows
from optim.runtime.formats.blocks import Array, Blocks
from optim.runtime.formats.pack_quantized import SUFFIXES, Scheme, dequantize, unpack
from optim.runtime.storage.checkpoint import Checkpoint, schemes_of
from optim.runtime.storage.integers import IntegerStore
from optim.runtime.storage.tensors import TensorInfo

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class PlainView:
    """Reads `checkpoint` under the names of its unquantized model.

    A packed linear's `weight` comes back as float32 `[out, in]`, exactly what its integers and
    scales stand for; every other tensor in its stored dtype.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.name = checkpoint, checkpoint.name
        self._scheme_of = schemes_of(checkpoint)
        self.tensors: dict[str, str | None] = {}
        """Plain name -> the packed linear it is read from; None where it is stored as it is."""
        for name in checkpoint.tensors:
            module, _, suffix = name.rpartition(".")
            if suffix == "weight_packed":
                self.tensors[f"{module}.weight"] = module
            elif suffix not in SUFFIXES:
                self.tensors[name] = None

    def hf_config(self) -> "PretrainedConfig":
        """The configuration without its quantization, so that a plain skeleton is built."""
        config = self.checkpoint.hf_config()
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        return config

    def with_integers(self) -> "PlainView":
        """The same model, the blocks of a GGUF source read as the integers they are."""
        from optim.runtime.storage.gguf.packed import with_integers

        made = with_integers(self.checkpoint)
        return self if made is self.checkpoint else PlainView(made)

    def read(self, name: str) -> Tensor:
        """One tensor by its plain name; OptimError (2) naming it if it is missing or corrupt."""
        if self.tensors.get(name) is None:
            return self.checkpoint.read(name)
        return dequantize(*self.integers(name))

    def scheme(self, name: str) -> Scheme | None:
        """How the tensor of this plain name is packed; None where it is not."""
        module = self.tensors[name]
        return None if module is None else self._scheme_of(module)

    def blocks(self, name: str) -> Blocks | None:
        """The type of GGUF's blocks that a weight is stored in, if it is."""
        module, store = self.tensors[name], self.checkpoint.store
        if module is None or not isinstance(store, IntegerStore):
            return None
        return store.blocks(self.checkpoint.stored_name(f"{module}.weight_packed"))

    def raw(self, name: str) -> Array:
        """These blocks, uint8 `[out, bytes of a row]`."""
        store = self.checkpoint.store
        assert isinstance(store, IntegerStore), name
        return store.raw(self.checkpoint.stored_name(f"{self.tensors[name]}.weight_packed"))

    def kept_as(self, name: str) -> str | None:
        """How a packed weight is stored, in words: `4-bit g64 sym`, `Q4_0`; None for others."""
        kind, scheme = self.blocks(name), self.scheme(name)
        return kind.name.upper() if kind else None if scheme is None else str(scheme)

    def integers(self, name: str) -> tuple[Tensor, Tensor, Tensor | None, Scheme]:
        """What a packed weight is stored as: `unpack`'s q, scale and zero, and their scheme."""
        module, scheme = self.tensors[name], self.scheme(name)
        assert module is not None and scheme is not None, name
        keys = (k for k in SUFFIXES if f"{module}.{k}" in self.checkpoint.tensors)
        tensors = {k: self.checkpoint.read(f"{module}.{k}") for k in keys}
        return *unpack(tensors, scheme, module), scheme

    def grid(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Scales `[out, groups]` and zero points, or offsets, of a weight without its integers."""
        module, scheme = self.tensors[name], self.scheme(name)
        assert module is not None and scheme is not None, name
        scale = self.checkpoint.read(f"{module}.weight_scale")
        if scheme.symmetric:
            return scale, None
        if scheme.offset:
            return scale, self.checkpoint.read(f"{module}.weight_offset")
        packed = self.checkpoint.read(f"{module}.weight_zero_point")
        return scale, unpack_rows(packed.T, scheme.bits, scale.shape[0]).T.contiguous()

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of what `read` gives."""
        module = self.tensors[name]
        if module is None:
            return self.checkpoint.tensors[name]
        outputs, inputs = (int(n) for n in self.checkpoint.read(f"{module}.weight_shape"))
        return TensorInfo((outputs, inputs), torch.float32, 4 * outputs * inputs)
