"""Tensors that are read as pack-quantized's though they are stored otherwise."""

from optim.runtime.formats.schemes import Scheme
from optim.runtime.storage.tensors import Store


class IntegerStore(Store):
    """A Store that knows how each linear is packed, where no configuration says it."""

    schemes: dict[str, Scheme]
    """By the stored name of the linear's `weight_packed`."""
