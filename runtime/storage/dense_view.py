"""An artifact as the plain model it stands for: packed linears read back as dense weights.

What evaluation walks over: the same tensors for every format, one definition of what they mean.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from optim.runtime.formats.pack_quantized import (
    SUFFIXES,
    dequantize,
    unpack,
)
from optim.runtime.storage.checkpoint import Checkpoint, schemes_of

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
        self._packed = {
            n.removesuffix(".weight_packed")
            for n in checkpoint.tensors
            if n.endswith(".weight_packed")
        }
        plain = {n for n in checkpoint.tensors if n.rpartition(".")[2] not in SUFFIXES}
        self.tensors = plain | {f"{module}.weight" for module in self._packed}

    def hf_config(self) -> "PretrainedConfig":
        """The configuration without its quantization, so that a plain skeleton is built."""
        config = self.checkpoint.hf_config()
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        return config

    def read(self, name: str) -> Tensor:
        """One tensor by its plain name; OptimError (2) naming it if it is missing or corrupt."""
        module = name.removesuffix(".weight")
        if module not in self._packed:
            return self.checkpoint.read(name)
        scheme = self._scheme_of(module)
        assert scheme is not None, module
        keys = (k for k in SUFFIXES if f"{module}.{k}" in self.checkpoint.tensors)
        tensors = {k: self.checkpoint.read(f"{module}.{k}") for k in keys}
        q, scale, zero = unpack(tensors, scheme, module)
        return dequantize(q, scale, zero, scheme)
