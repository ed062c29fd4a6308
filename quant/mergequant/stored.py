"""What is stored of a block of static integers, by published name."""

import torch
from torch import Tensor, nn

from optim.runtime.decoder.linears.static_int import StepLinear, StepNorm
from optim.runtime.formats.static_int import SITE_PARTS, Site, StaticSite
from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.walk.walk import StoredLinear


def static_tensors(block: nn.Module, prefix: str, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """What is stored of a block of static integers, by published name."""
    tensors: dict[str, Tensor] = {}
    owned: set[str] = set()
    for name, module in block.named_modules():
        if isinstance(module, StepNorm):
            stored = checkpoint.disk_name(f"{prefix}{name}.weight").removesuffix(".weight")
            tensors |= {f"{stored}.{k}": v for k, v in _site(module.site).items()}
        elif isinstance(module, StepLinear):
            stored = checkpoint.disk_name(f"{prefix}{name}.weight").removesuffix(".weight")
            tensors |= {f"{stored}.{key}": value for key, value in _linear(module).items()}
        elif isinstance(module, StoredLinear):
            owned |= {f"{name}.weight", f"{name}.bias"}
            stored = checkpoint.disk_name(f"{prefix}{name}.weight").removesuffix(".weight")
            tensors[f"{stored}.weight"] = module.dense().cpu()
            bias = module.dense_bias()
            if bias is not None:
                tensors[f"{stored}.bias"] = bias.cpu()
    for name, parameter in block.named_parameters():
        if name not in owned:
            tensors[checkpoint.disk_name(prefix + name)] = parameter.detach().float().cpu()
    return {
        name: tensor.clone().contiguous() for name, tensor in tensors.items()
    }  # experts share a site


def _linear(linear: StepLinear) -> dict[str, Tensor]:
    parts = {"weight_packed": linear.packed, "weight_scale": linear.scale}
    if linear.bias is not None:
        parts["bias"] = linear.bias
    if linear.site is not None:
        parts |= {f"input_{key}": value for key, value in _site(linear.site).items()}
    return {key: value.cpu() for key, value in parts.items()}


def _site(site: Site) -> dict[str, Tensor]:
    if not isinstance(site, StaticSite):
        return {"clip": torch.tensor([site.clip])}
    found = {key: getattr(site, key) for key in SITE_PARTS}
    return {key: value.cpu() for key, value in found.items() if value is not None}
