"""What a text takes in a device's memory beside the weights."""

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.architecture.shape import resolve
from optim.runtime.architecture.table import FAMILIES
from optim.runtime.storage.open import open_checkpoint

CACHE_BYTES = 2  # of a key's or value's number


def context_bytes(source: str, context: int) -> int:
    """Bytes of a text of `context` tokens: its cache of 16 bits, and the activations of its prompt
    read in one go, about; OptimError (2) for a family that is not known."""
    checkpoint = open_checkpoint(source)
    if checkpoint.family not in FAMILIES:
        what = f"the caches of the family {checkpoint.family!r} are not known here"
        raise OptimError(what, "give the size of the weights: --fit", USAGE)
    shape = resolve(checkpoint.settings, FAMILIES[checkpoint.family].decoder)
    cache = 2 * len(shape.layers) * shape.kv_heads * shape.head_dim * context * CACHE_BYTES
    inner = max(shape.inner, shape.expert_inner * shape.experts_per_token)
    return cache + 4 * context * (4 * shape.hidden + 2 * inner) + 4 * shape.vocab
