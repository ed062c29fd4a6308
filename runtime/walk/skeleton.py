"""A model of transformers without its weights, and what fills it.

Parameters and persistent buffers come from the checkpoint, derived buffers (rotary tables) from the
family's own initialization. What neither gives a value is refused: never an empty tensor.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.architecture.shape import relu_threshold
from optim.runtime.decoder.layers import raise_threshold
from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.storage.dense_view import PlainView

EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj")
THEIRS = (
    *(ValueError, TypeError, LookupError, ArithmeticError),
    *(AttributeError, RuntimeError, AssertionError, ImportError),
)
FIX = "this family's tensors may not be named as transformers names them"


@contextmanager
def their_errors(name: str, kind: str) -> Iterator[None]:
    """Errors of transformers' own code, which a configuration can cause in many ways, as ours."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except THEIRS as error:
        why = " ".join(str(error).split())[:300] or type(error).__name__
        what = f"{name}: transformers' {kind} does not run with this configuration: {why}"
        raise OptimError(what, "check config.json, or try another transformers", USAGE) from error


def meta_model(checkpoint: Checkpoint | PlainView, dtype: torch.dtype) -> Any:
    """The model of `checkpoint` on the meta device, in eval mode.

    Raises OptimError (2) where transformers has no such causal language model.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = checkpoint.hf_config()
    known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if not known and "auto_map" not in vars(config):
        what = f"{checkpoint.name}: transformers has no causal language model for model_type "
        fix = "choose a decoder-only language model"
        raise OptimError(f"{what}{config.model_type!r}", fix, USAGE)
    factory: Any = AutoModelForCausalLM
    with torch.device("meta"), their_errors(checkpoint.name, config.model_type):
        model = factory.from_config(config, dtype=dtype)
    raise_threshold(model, relu_threshold(getattr(config, "hidden_act_param", None)))
    return model.eval()


def is_fused_experts(module: nn.Module) -> bool:
    """Whether this is transformers' module of all experts of a mixture."""
    weight = getattr(module, "gate_up_proj", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 3


def refuse_strange(model: nn.Module, names: Collection[str], source: str) -> None:
    """Refuse, before any work, what a walk or a run of `model` would stumble over.

    `names` are the stored tensors' canonical names. Raises OptimError (2).
    """
    for path, module in model.named_modules():
        if is_fused_experts(module):
            _refuse_experts(path, module, names, source)


def _refuse_experts(path: str, module: nn.Module, names: Collection[str], source: str) -> None:
    """Experts are gate, up and down, one linear each, without a bias."""
    kind = f"{source}: the experts of {type(module).__name__}"
    own = {name for name, _ in module.named_parameters()}
    if own != {"gate_up_proj", "down_proj"} or getattr(module, "is_transposed", False):
        what = f"{kind} are not gate, up and down projections without biases"
        raise OptimError(what, "this mixture is not understood; choose another model", USAGE)
    wanted = [f"{path}.0.{part}" for part in EXPERT_PARTS]
    for name in wanted:
        if f"{name}.weight" not in names and f"{name}.weight_packed" not in names:
            raise OptimError(f"{kind}: there is no tensor {name}.weight", FIX, USAGE)


def fill_buffers(
    model: Any,
    module: nn.Module,
    prefix: str,
    names: Collection[str],
    read: Callable[[str], Tensor],
    device: torch.device,
) -> None:
    """Give the module's own buffers that are still on the meta device their values.

    Its parameters must still be there too: the initialization that makes derived buffers would
    write over them. Raises OptimError (2) for a buffer that no file and no initialization fills.
    """
    fresh = {}
    for key, like in list(module.named_buffers(recurse=False)):
        if not like.is_meta:
            continue
        persistent = key not in module._non_persistent_buffers_set
        if persistent and prefix + key in names:
            stored = read(prefix + key)
            if stored.shape != like.shape:
                what = f"{prefix + key} is {list(stored.shape)}, expected {list(like.shape)}"
                raise OptimError(what, FIX, USAGE)
            value = stored.to(device, like.dtype)
        else:
            value = fresh[key] = _nothing(like, device)
        module.register_buffer(key, value, persistent)
    if not fresh:
        return
    held = {key: value.clone() for key, value in fresh.items()}
    model._init_weights(module)
    for key, before in held.items():
        now = getattr(module, key)
        if now.dtype != torch.bool and now.numel() and torch.equal(_bits(now), _bits(before)):
            what = f"the buffer {prefix}{key} has no value in the checkpoint"
            raise OptimError(what, FIX, USAGE)


def _nothing(like: Tensor, device: torch.device) -> Tensor:
    """A buffer of values that no initialization gives."""
    if like.dtype == torch.bool:
        return torch.zeros_like(like, device=device)
    value = torch.nan if like.is_floating_point() else torch.iinfo(like.dtype).min
    return torch.full_like(like, value, device=device)


def _bits(value: Tensor) -> Tensor:
    return value.nan_to_num(1e30) if value.is_floating_point() else value
