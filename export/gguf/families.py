"""What a family is called in GGUF, and what of its configuration the runtimes have a place for.

Names of tensors, turned rows and norms are those that the reader undoes (storage/gguf/store.py):
the tables there are used backwards here. What a family's code in llama.cpp takes for granted, and a
file cannot say, is checked: a model that differs is refused.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from optim.export.exporter import refuse
from optim.runtime.architecture.shape import Shape
from optim.runtime.storage.dense_view import PlainView
from optim.runtime.storage.gguf.store import BLOCK, OWN, TOP

PLAIN_MODEL = "export it as safetensors, which transformers runs"
SILU, GELU = ("silu", "swish"), ("gelu_pytorch_tanh",)


@dataclass(frozen=True, slots=True)
class Row:
    """One family: its architecture in GGUF, and what llama.cpp's code for that has fixed."""

    arch: str
    biased: frozenset[str] = frozenset()
    """Linears that may have a bias; see Shape."""
    activation: tuple[str, ...] = SILU
    own_head: bool = False
    """The head is a tensor of its own, also where it is tied to the embeddings."""
    tied: bool = False
    """The head is the embeddings, always."""
    own_head_dim: bool = True
    """A head's width may differ from hidden / heads."""
    window: Callable[[int], bool] | None = None
    """Whether a layer has a window, by its number; None where no layer has."""
    rope: Callable[[int], bool] = lambda _layer: True
    """Whether a layer turns its queries and keys."""
    largest: int = 0
    """Layers of the generation's largest model, which scales queries by hidden / heads."""


ALL = frozenset({"qkv", "out", "mlp"})
FAMILIES: dict[str, Row] = {
    "llama": Row("llama", ALL),
    "mistral": Row("llama"),
    "mixtral": Row("llama"),
    "qwen2": Row("qwen2", frozenset({"qkv"}), own_head_dim=False),
    "qwen3": Row("qwen3"),
    "qwen3_moe": Row("qwen3moe"),
    "gemma2": Row(
        "gemma2", activation=GELU, tied=True, window=lambda layer: layer % 2 == 0, largest=46
    ),
    "gemma3_text": Row(
        "gemma3", activation=GELU, tied=True, window=lambda layer: layer % 6 < 5, largest=62
    ),
    "phi3": Row("phi3", own_head_dim=False, window=lambda _layer: True),
    "granite": Row("granite", ALL, own_head_dim=False),
    "olmo2": Row("olmo2", own_head=True),
    "olmo3": Row("olmo2", own_head=True, window=lambda layer: layer % 4 < 3),
    "smollm3": Row("smollm3", frozenset({"qkv", "out"}), rope=lambda layer: layer % 4 < 3),
}


def row_of(model: PlainView) -> Row:
    """The family's row; OptimError (2) where there is none."""
    family = model.checkpoint.family
    if family not in FAMILIES:
        why = f"no GGUF form is known here for the family {family!r}"
        raise refuse(model, why, f"families: {', '.join(FAMILIES)}; or {PLAIN_MODEL}")
    return FAMILIES[family]


def check(model: PlainView, shape: Shape, row: Row) -> None:
    """Raise OptimError (2) for what a file of this architecture cannot say."""
    for why in _problems(model, shape, row):
        raise refuse(model, f"{row.arch} files cannot say that {why}", PLAIN_MODEL)


def _problems(model: PlainView, shape: Shape, row: Row) -> Iterator[str]:
    settings = model.checkpoint.settings
    if shape.activation not in row.activation:
        yield f"its activation is {shape.activation}, not {row.activation[0]}"
    if extra := shape.biased - row.biased:
        yield f"its linears of {', '.join(sorted(extra))} have biases"
    if not row.own_head_dim and shape.head_dim * shape.heads != shape.hidden:
        yield f"a head has {shape.head_dim} channels, not hidden / heads"
    if row.tied and not shape.tied:
        yield "its head differs from its embeddings"
    if shape.experts and not shape.normalize_experts:
        yield "the weights of its experts do not sum to 1"
    if shape.experts and not all(layer.mixture for layer in shape.layers):
        yield "only some of its layers are mixtures of experts"
    if row.window is not None and any(layer.window for layer in shape.layers):
        for number, layer in enumerate(shape.layers):
            if row.window(number) != (layer.window is not None):
                yield f"its layer {number} has {'a' if layer.window else 'no'} sliding window"
    for number, layer in enumerate(shape.layers):
        if row.rope(number) != (layer.rope is not None):
            yield f"its layer {number} has {'a' if layer.rope else 'no'} rotary embedding"
    if row.largest:
        largest = len(shape.layers) == row.largest
        width = shape.hidden / shape.heads if largest else shape.head_dim
        if abs(shape.attention_scale * width**0.5 - 1) > 1e-6:
            yield f"its queries are scaled by {settings.query_pre_attn_scalar}^-0.5"


def gguf_name(canonical: str, arch: str) -> str | None:
    """A tensor's name in the file; an expert's is that of its stack. None for an unknown one."""
    stem, _, suffix = canonical.rpartition(".")
    top = {ours: theirs for theirs, ours in TOP.items()}
    if stem in top:
        return f"{top[stem]}.{suffix}"
    parts = stem.split(".")
    if parts[:2] != ["model", "layers"] or len(parts) < 4:
        return None
    inside = ".".join(part for part in parts[3:] if not part.isdigit())
    block = {ours: theirs for theirs, ours in (BLOCK | OWN.get(arch, {})).items()}
    block |= {ours: theirs for theirs, ours in OWN.get(arch, {}).items()}
    return f"blk.{parts[2]}.{block[inside]}.{suffix}" if inside in block else None


def note_of_window(shape: Shape, row: Row) -> str | None:
    """What to say of windows that the architecture leaves out."""
    windows = {layer.window for layer in shape.layers if layer.window}
    if row.window is not None or not windows or min(windows) >= shape.max_context:
        return None
    return (
        f"GGUF has no place for its sliding window of {min(windows)} tokens: "
        "longer texts are attended to as a whole"
    )


Pairs = dict[str, Any]


def metadata(model: PlainView, shape: Shape, row: Row) -> Pairs:
    """The keys of the architecture, without its prefix; ints, floats, lists of bools, strings."""
    made: Pairs = {
        "context_length": shape.max_context,
        "embedding_length": shape.hidden,
        "block_count": len(shape.layers),
        "feed_forward_length": shape.inner,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.layer_norm_rms_epsilon": shape.eps,
        "vocab_size": shape.vocab,
    }
    if row.own_head_dim:
        made |= {"attention.key_length": shape.head_dim, "attention.value_length": shape.head_dim}
    if shape.experts:
        made |= {
            "expert_count": shape.experts,
            "expert_used_count": shape.experts_per_token,
            "expert_feed_forward_length": shape.expert_inner,
        }
    windows = {layer.window for layer in shape.layers if layer.window}
    if row.window is not None and windows:
        made["attention.sliding_window"] = max(windows)
    if row.arch == "olmo2" and windows:
        made["attention.sliding_window_pattern"] = [bool(x.window) for x in shape.layers]
    if shape.attention_cap is not None:
        made["attn_logit_softcapping"] = shape.attention_cap
    if shape.logit_cap is not None:
        made["final_logit_softcapping"] = shape.logit_cap
    if row.arch == "granite":
        made |= {
            "attention.scale": shape.attention_scale,
            "embedding_scale": shape.embed_scale,
            "residual_scale": shape.residual_scale,
            "logit_scale": 1 / shape.logit_scale,
        }
    return made
