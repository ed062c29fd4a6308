"""The kinds of cases: each makes one from a sound base, and says what is done with it.

A kind is a function `(draw, folder) -> (what, case)`: `folder` is its own to write in, with the
bases beside it in BASES; `case` is run in a child and ends in an exact result, or an OptimError.
"""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import lies
import torch
from harness import WrongError

from optim.recipes.errors import OptimError

Case = Callable[[], Any]
Kind = Callable[[Random, Path], tuple[str, Case]]
BASES = Path()  # set by run.py
PROMPT = [1, 5, 7, 9, 20]
CHAT = [{"role": "user", "content": "Hi there"}]
INTEGERS = ("awq4", "awq4-sym", "awq3", "awq8-sym", "awq4-mixed", "awq4-mixture")
STATIC = ("static", "static-literal", "static-mixture")
LOSSLESS = ("df11", "bf12", "df11-mixture", "bf12-mixture", "awq4-bf12")
SIDES = ("core", "core-awq4", "gate", "relu-exact", "fatrelu-exact", "threshold", "threshold-awq4")
POLICIES = ((16, "full"), (8, "full"), (4, "full"), (16, "stream"), (4, "stream"))
BROKEN = ("\t", "{", "&a [*a]", "!!python/x", "\x00", "'")
CONFIG_KEYS = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "rope_scaling", "rope_parameters", "rope_theta", "sliding_window"),
    *("model_type", "hidden_act", "attention_bias", "mlp_bias", "tie_word_embeddings"),
    *("partial_rotary_factor", "eos_token_id", "bos_token_id", "num_local_experts", "text_config"),
    *("quantization_config", "logits_scaling", "final_logit_softcapping", "layer_types"),
    *("num_experts_per_tok", "max_position_embeddings", "_attn_implementation", "architectures"),
)


def copied(base: str, folder: Path) -> Path:
    """A base, to be changed."""
    return Path(shutil.copytree(BASES / base, folder / base))


def use(source: Path) -> torch.Tensor:
    """What inspect and run do with a model: facts, a chat, logits of a prompt and of two steps."""
    from optim.cli.inspect import _facts
    from optim.runtime.engine.load import load_model
    from optim.runtime.storage.open import open_checkpoint

    _facts(open_checkpoint(str(source)))
    model = load_model(str(source), threads=1, device="cpu")
    if (source / "tokenizer.json").is_file() and model.tokenizer.has_chat_template:
        model.tokenizer.decode(model.tokenizer.encode("Hi"))
    cache = model.new_cache(length=32)
    out = model.forward(torch.tensor([PROMPT]), cache)
    rows = [out]
    for _ in range(2):
        out = model.forward(torch.nan_to_num(out).argmax(-1, keepdim=True), cache)
        rows.append(out)
    return torch.cat(rows)


def same_tensors(folder: Path) -> None:
    """Compare what is read with what the safetensors library reads."""
    from safetensors import SafetensorError

    from optim.runtime.storage.open import open_checkpoint
    from optim.runtime.storage.tensors import Part

    checkpoint = open_checkpoint(str(folder))
    known: dict[str, torch.Tensor] = {}
    for path in checkpoint.store.files:
        try:
            known |= lies.load(path)[0]
        except (SafetensorError, UnicodeError):
            return  # it is stricter than we are on gaps, which do no harm
    for name in checkpoint.store.infos:
        ours, theirs = (
            tensor.contiguous().view(-1).view(torch.uint8)
            for tensor in (checkpoint.store.read(Part(name)), known[name])
        )
        if not torch.equal(ours, theirs):
            raise WrongError(f"{name} is not what the file holds")


def shards(draw: Random, folder: Path) -> tuple[str, Case]:
    """Headers, indexes and tensors of dense and integer checkpoints, and of a torch file."""
    base = draw.choice(("plain", "plain", "torch", *INTEGERS))
    source = copied(base, folder)
    if base == "torch":
        said = lies.flip(source / "pytorch_model.bin", draw, most=1 << 20)
        return f"{base} {said}", lambda: use(source)
    path = draw.choice(sorted(source.glob("*.safetensors")))
    kind = draw.randrange(3)
    if kind == 0:
        index = source / "model.safetensors.index.json"
        data = json.loads(index.read_text())
        said = lies.lie(data, draw)
        lies.write_json(index, data)
    elif kind == 1:
        said = lies.header_lie(path, draw)
    else:
        said = lies.lie_in_tensors(path, draw, draw.randrange(1, 3))

    def case() -> None:
        same_tensors(source)
        use(source)

    return f"{base} {said}", case


def gguf(draw: Random, folder: Path) -> tuple[str, Case]:
    """Bytes of a GGUF file's header and metadata."""
    source = copied("gguf", folder) / "model.gguf"
    said = lies.flip(source, draw, most=draw.choice((64, 1000, 10_000)))
    return said, lambda: use(source)


def config(draw: Random, folder: Path) -> tuple[str, Case]:
    """Values of config.json."""
    base = draw.choice(("plain", "plain", *INTEGERS, *STATIC, *LOSSLESS, "core", "threshold"))
    source = copied(base, folder)
    data = json.loads((source / "config.json").read_text())
    said = lies.lie(data, draw, draw.randrange(1, 4), CONFIG_KEYS)
    lies.write_json(source / "config.json", data)
    return f"{base} {said}", lambda: use(source)


STEPS: tuple[dict[str, Any], ...] = (
    {"type": "FixedLength", "length": 0},
    {"type": "Precompiled", "precompiled_charsmap": "////////"},
    {"type": "Replace", "pattern": {"Regex": "(a|a)*[0-9]x"}, "content": "x"},
    {"type": "Replace", "pattern": {"String": ""}, "content": "xx"},
    {"type": "Split", "pattern": {"Regex": r"\w+\w+ [x-z]"}, "behavior": "Isolated"},
    {"type": "Strip", "content": "a", "start": 2**40, "stop": 2**40},
    {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "aaaa"}] * 30},
    {"type": "Sequence", "pretokenizers": []},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 999},
    {"type": "Metaspace", "replacement": "", "prepend_scheme": "always", "split": True},
)


def tokenizer(draw: Random, folder: Path) -> tuple[str, Case]:
    """Values of tokenizer.json and its kin; hostile steps."""
    source = copied("plain", folder)
    name = draw.choice(("tokenizer.json", "tokenizer.json", "tokenizer_config.json"))
    data = json.loads((source / name).read_text())
    if name == "tokenizer.json" and draw.random() < 0.5:
        part = draw.choice(("normalizer", "pre_tokenizer", "post_processor", "decoder"))
        data[part] = step = dict(draw.choice(STEPS))
        said = f"{part} {step}"[:100]
    else:
        said = lies.lie(data, draw, draw.randrange(1, 4))
    lies.write_json(source / name, data)

    def case() -> None:
        from optim.runtime.storage.open import open_checkpoint

        made = open_checkpoint(str(source)).tokenizer()
        for text in ("Hi there, 12.5 cats\n", "a" * 200, "é漢🙂\x00"):
            made.decode(made.encode(text, special=True))
        with contextlib.suppress(OptimError):
            made.encode("\ud800")
        if made.has_chat_template:
            made.chat(CHAT)

    return f"{name} {said}", case


PIECES = (
    "{% for i in range(100000) %}",
    "{% for m in messages %}",
    "{% set ns = namespace(x='ab') %}",
    "{% set ns.x = ns.x ~ ns.x %}",
    "{{ ns.x * 1000 }}",
    "{{ 'a' * 10 ** 9 }}",
    "{{ messages[0].content }}",
    "{{ messages | tojson(indent=9) }}",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ raise_exception('\x1b[31mno') }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ strftime_now('%Y') }}",
    "{{ (" * 500,
    "{% if true %}" * 100,
    "{% endfor %}",
    "{% generation %}x{% endgeneration %}",
    "{% include 'x' %}",
    "{{ lipsum(1000) }}",
    "{{ range(100000) | list | join('x') | length }}",
    "\x00\ud800",
)


def template(draw: Random, folder: Path) -> tuple[str, Case]:
    """Chat templates put together from hostile pieces."""
    source = copied("plain", folder)
    text = "".join(draw.choice(PIECES) for _ in range(draw.randrange(1, 6)))
    text += "{% endfor %}" * (text.count("{% for") if draw.random() < 0.8 else 0)
    data = json.loads((source / "tokenizer_config.json").read_text())
    odd = draw.random() < 0.2
    data["chat_template"] = lies.value(draw) if odd else text
    lies.write_json(source / "tokenizer_config.json", data)

    def case() -> None:
        from optim.runtime.storage.open import open_checkpoint

        made = open_checkpoint(str(source)).tokenizer()
        made.chat(CHAT)

    return repr(data["chat_template"])[:120], case


def manifest(draw: Random, folder: Path) -> tuple[str, Case]:
    """Values of optim.json."""
    base = draw.choice((*INTEGERS, *STATIC, *LOSSLESS, *SIDES))
    source = copied(base, folder)
    data = json.loads((source / "optim.json").read_text())
    said = lies.lie(data, draw, draw.randrange(1, 3))
    lies.write_json(source / "optim.json", data)

    def case() -> None:
        from optim.cli.inspect import inspect
        from optim.export.lossless.pack import pack
        from optim.export.lossless.plan import plan
        from optim.recipes.schema import Pack

        inspect(str(source), verify=draw.random() < 0.5, as_json=draw.random() < 0.5)
        use(source)
        packing = Pack(layout="bf12")
        pack(plan(str(source), packing, str(folder / "packed")), lambda *_: None)

    return f"{base} {said}", case


def _tensor_case(bases: tuple[str, ...], files: str) -> Kind:
    def kind(draw: Random, folder: Path) -> tuple[str, Case]:
        base = draw.choice(bases)
        source = copied(base, folder)
        path = draw.choice(sorted(source.glob(files)))
        roll = draw.random()
        if roll < 0.15:
            said = lies.header_lie(path, draw)
        elif roll < 0.35:
            data = json.loads((source / "config.json").read_text())
            key = next((k for k in data if k.endswith("_config")), None)
            said = lies.lie(data[key] if key else data, draw)
            lies.write_json(source / "config.json", data)
        else:
            said = lies.lie_in_tensors(path, draw, draw.randrange(1, 3))
        return f"{base} {said}", lambda: use(source)

    return kind


def side(draw: Random, folder: Path) -> tuple[str, Case]:
    """The side file of a pruned model: tensors, and the facts in its metadata."""
    from safetensors.torch import save_file

    base = draw.choice(SIDES)
    source = copied(base, folder)
    path = source / "sparsity.safetensors"
    if draw.random() < 0.2:
        return f"{base} {lies.header_lie(path, draw)}", lambda: use(source)
    tensors, metadata = lies.load(path)
    facts = json.loads(metadata["optim"])
    if draw.random() < 0.4:
        said = lies.lie(facts, draw)
    elif tensors:
        said = lies.tensor_lie(tensors, draw)
    else:
        said = "nothing"
    metadata["optim"] = json.dumps(facts)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata)
    return f"{base} {said}", lambda: use(source)


static = _tensor_case(STATIC, "model-*.safetensors")


def lossless(draw: Random, folder: Path) -> tuple[str, Case]:
    """Packed tensors: what decodes to something else must not be taken for the original."""
    base = draw.choice(LOSSLESS)
    source = copied(base, folder)
    kind = draw.random()
    path = draw.choice(sorted(source.glob("*.safetensors")))
    if kind < 0.2:
        said = lies.header_lie(path, draw)
    elif kind < 0.4:
        data = json.loads((source / "config.json").read_text())
        key = next(k for k in ("dfloat11_config", "bf12_config") if k in data)
        said = lies.lie(data, draw) if draw.random() < 0.3 else lies.lie(data[key], draw)
        lies.write_json(source / "config.json", data)
    else:
        said = lies.lie_in_tensors(path, draw, draw.randrange(1, 3))

    def case() -> None:
        from optim.export.lossless.unpack import unpack

        use(source)
        unpack(str(source), str(folder / "out"), lambda *_: None)

    return f"{base} {said}", case


def session(draw: Random, folder: Path) -> tuple[str, Case]:
    """A saved conversation and the cache beside it."""
    kept = folder / "talk.json"
    bits, policy = draw.choice(POLICIES)
    return _session_case(draw, kept, bits, policy)


def _session_case(draw: Random, kept: Path, bits: int, policy: str) -> tuple[str, Case]:
    from optim.cli.conversation.saved import SavedChat, cache_beside, load, save
    from optim.runtime.cache.saved import load_cache, save_cache

    chat = SavedChat(model="m", messages=[{"role": "user", "content": "Hi"}])  # type: ignore[list-item]
    save(kept, chat)
    model, made = small_model(), _policy(bits, policy)
    cache = model.new_cache(length=64, policy=made)
    model.forward(torch.tensor([PROMPT]), cache)
    save_cache(cache_beside(kept), cache, PROMPT, "model")
    if draw.random() < 0.4:
        data = json.loads(kept.read_text())
        said = lies.lie(data, draw)
        lies.write_json(kept, data)
    elif draw.random() < 0.3:
        said = lies.header_lie(cache_beside(kept), draw)
    else:
        said = lies.lie_in_tensors(cache_beside(kept), draw)

    def case() -> None:
        load(kept)
        fresh = model.new_cache(length=64, policy=made)
        tokens, _ = load_cache(cache_beside(kept), fresh, "model")
        out = model.forward(torch.tensor([[7]]), fresh)
        if tokens and list(out.shape) != [1, 264]:
            raise WrongError(f"logits of shape {list(out.shape)}")

    return f"{bits} {policy} {said}", case


_models: list[Any] = []


def small_model() -> Any:
    """The base `plain`, loaded once."""
    from optim.runtime.engine.load import load_model

    if not _models:
        _models.append(load_model(str(BASES / "plain"), threads=1, device="cpu"))
    return _models[0]


def _policy(bits: int, kind: str) -> Any:
    from optim.runtime.cache.full import Policy

    return Policy(bits, kind)  # type: ignore[arg-type]


def recipe(draw: Random, folder: Path) -> tuple[str, Case]:
    """Recipes: built-in ones with lies in them, and broken text."""
    import yaml

    from optim.recipes import build

    source = draw.choice(sorted(Path(build.__file__).parent.glob("*.yaml")))
    data = yaml.safe_load(source.read_text())
    said = lies.lie(data, draw, draw.randrange(1, 3))
    text = yaml.safe_dump(data, allow_unicode=True)
    if draw.random() < 0.3:
        at = draw.randrange(len(text))
        text = text[:at] + draw.choice(BROKEN) + text[at:]
    path = folder / "r.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return f"{source.stem} {said}", lambda: build.build_recipe(str(path))


def batch(draw: Random, folder: Path) -> tuple[str, Case]:
    """Lines of a batch file."""
    from optim.cli.batch import How, prepare
    from optim.runtime.engine.sampling import Sampling

    line: dict[str, Any] = {"id": 1, "prompt": "Hi", "temperature": 0.5, "max_tokens": 4}
    if draw.random() < 0.4:
        line = {"messages": [{"role": "user", "content": "Hi"}], "stop": ["x"], "seed": 1}
    said = lies.lie(line, draw, draw.randrange(1, 3), ("system", "top_k", "top_p", "stop", "id"))
    data = json.dumps(line).encode()
    if draw.random() < 0.3:
        data = data[: draw.randrange(len(data))] + draw.choice((b"\xff", b"9" * 5000, b"[" * 5000))
    model = small_model()

    def case() -> None:
        from optim.runtime.engine.scheduler import answer_all

        job = prepare(1, data, model, How("", False, Sampling(max_tokens=4), 64))
        if job.request is not None:
            for _ in answer_all(model, [job.request], context=64, size=1, policy=None):
                pass

    return f"{said} {data[:40]!r}", case


KINDS: dict[str, Kind] = {
    "shards": shards,
    "gguf": gguf,
    "config": config,
    "tokenizer": tokenizer,
    "template": template,
    "manifest": manifest,
    "side": side,
    "static": static,
    "lossless": lossless,
    "session": session,
    "recipe": recipe,
    "batch": batch,
}
