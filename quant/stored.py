"""What is stored of rounded linears: integers and grids, by published name."""

import torch
from torch import Tensor, nn

from optim.quant.grid import Grid, nearest
from optim.quant.rounding import RoundedLinear
from optim.runtime.formats.block_scales import Scales, packed_rows
from optim.runtime.formats.blocks import BLOCKS
from optim.runtime.formats.pack_quantized import Scheme, pack
from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.walk.walk import StoredLinear


def block_tensors(
    block: nn.Module, prefix: str, checkpoint: Checkpoint, dtype: torch.dtype
) -> dict[str, Tensor]:
    """What is stored of a solved block, by published name: packed linears, the rest as it was."""
    tensors: dict[str, Tensor] = {}
    owned: set[str] = set()
    for name, module in block.named_modules():
        if not isinstance(module, StoredLinear):
            continue
        owned |= {f"{name}.weight", f"{name}.bias"}
        stored = checkpoint.disk_name(f"{prefix}{name}.weight").removesuffix(".weight")
        if isinstance(module, RoundedLinear):
            tensors |= {f"{stored}.{k}": v for k, v in packed(module, dtype).items()}
        else:
            info = checkpoint.tensors[f"{prefix}{name}.weight"]
            tensors[f"{stored}.weight"] = module.dense().to(info.dtype).cpu()
        bias = module.dense_bias()
        if bias is not None:
            info = checkpoint.tensors[f"{prefix}{name}.bias"]
            tensors[f"{stored}.bias"] = bias.to(info.dtype).cpu()
    for name, parameter in block.named_parameters():
        if name not in owned:
            info = checkpoint.tensors[prefix + name]
            tensors[checkpoint.disk_name(prefix + name)] = parameter.detach().to(info.dtype).cpu()
    return tensors


def packed(linear: RoundedLinear, dtype: torch.dtype) -> dict[str, Tensor]:
    """The stored tensors of a rounded linear."""
    return _packed(linear.weight.detach(), linear.grid, dtype)


def _packed(q: Tensor, grid: Grid, dtype: torch.dtype) -> dict[str, Tensor]:
    q, scheme = q.cpu(), grid.scheme
    if scheme.blocks is None:
        zero = None if scheme.symmetric else grid.zero.to(torch.uint8).cpu()
        return pack(q, grid.scale.to(dtype).cpu(), zero, scheme)
    heads = None if grid.heads is None else grid.heads.cpu()
    scales = Scales(grid.scale.cpu(), grid.zero.cpu(), heads)
    return {"weight_blocks": torch.from_numpy(packed_rows(q, scales, BLOCKS[scheme.blocks]))}


def packed_head(
    module: str, weight: Tensor, scheme: Scheme, dtype: torch.dtype
) -> dict[str, Tensor]:
    """A head rounded plainly, some rows at a time: it is the largest tensor of many models."""
    parts = [nearest(rows.float(), scheme, dtype) for rows in torch.split(weight, 8192)]
    q = torch.cat([part.to(torch.uint8) for part, _ in parts])
    scale, zero = (torch.cat([getattr(g, k) for _, g in parts]) for k in ("scale", "zero"))
    heads = [grid.heads for _, grid in parts if grid.heads is not None]
    stored = _packed(q, Grid(scale, zero, scheme, torch.cat(heads) if heads else None), dtype)
    return {f"{module}.{key}": value for key, value in stored.items()}
