"""Tensors that are read as pack-quantized's though they are stored otherwise."""

from abc import abstractmethod

from optim.runtime.formats.blocks import Array, Blocks
from optim.runtime.formats.schemes import Scheme
from optim.runtime.storage.tensors import Store


class IntegerStore(Store):
    """A Store that knows how each linear is packed, where no configuration says it."""

    schemes: dict[str, Scheme]
    """By the stored name of the linear's `weight_packed`."""

    @abstractmethod
    def blocks(self, name: str) -> Blocks | None:
        """The type of GGUF's blocks in which the linear of this `weight_packed` is stored."""

    @abstractmethod
    def raw(self, name: str) -> Array:
        """The blocks themselves, uint8 `[out, bytes of a row]`, rows in Hugging Face's order;
        only of a linear for which `blocks` names a type."""
