"""Every format of others that is read, and how it is found in config.json."""

from collections.abc import Mapping
from typing import Any

from optim.runtime.architecture.config import text_part
from optim.runtime.storage.foreign.awq import Awq
from optim.runtime.storage.foreign.blocks import METHOD as BLOCKS
from optim.runtime.storage.foreign.blocks import InBlocks
from optim.runtime.storage.foreign.float8 import Float8
from optim.runtime.storage.foreign.gptq import Gptq
from optim.runtime.storage.foreign.layout import Layout
from optim.runtime.storage.foreign.mlx import Mlx

LAYOUTS: dict[str, type[Layout]] = {
    "awq": Awq,
    "gptq": Gptq,
    "fp8": Float8,
    "mlx": Mlx,
    BLOCKS: InBlocks,
}


def block_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a configuration says about its quantization, wherever it says it; None: nothing."""
    for part in (config, text_part(dict(config))):
        for key in ("quantization_config", "quantization"):
            block = part.get(key)
            if isinstance(block, dict) and block:
                return block
    return None


def foreign_layout(config: Mapping[str, Any]) -> Layout | None:
    """The format of others that a model is in, None for plain ones and ours.

    Raises OptimError (2) for a variant that is not read.
    """
    block = block_of(config) or {}
    method = block.get("quant_method")
    if method is None and "bits" in block and "group_size" in block:
        method = "mlx"
    if method == "compressed-tensors" and block.get("format") == "float-quantized":
        method = "fp8"
    kind = LAYOUTS.get(method) if isinstance(method, str) else None
    return None if kind is None else kind(block)
