"""The kinds of cases that other programs take part in: exports, folders and requests of theirs."""

import json
from pathlib import Path
from random import Random
from typing import Any

import kinds
import lies
from harness import WrongError
from kinds import INTEGERS, LOSSLESS, Case, Kind, copied, use

from optim.recipes.errors import OptimError
from optim.recipes.schema import Export

FOREIGN = ("awq4-as-awq", "awq4-as-gptq", "awq8-as-gptq", "awq3-as-mlx", "awq4-as-gguf")
"""Bases that bases.py exports: the artifact, and the format it goes into."""
FORMATS = ("gguf", "safetensors", "awq", "gptq", "mlx", "compressed-tensors")
TYPES = (None, None, "f32", "bf16", "q8_0", "q4_0")
BLOCK_KEYS = (
    *("bits", "group_size", "quant_method", "version", "zero_point", "desc_act", "sym", "dynamic"),
    *("w_bit", "q_group_size", "modules_to_not_convert", "mode", "checkpoint_format"),
)


def write(source: Path, to: Path, form: str, kind: str | None = None) -> Path:
    """Export `source` to the format `form`; returns what to open."""
    from optim.export.run import export, plan

    wanted = Export.model_validate({"format": form} | ({"type": kind} if kind else {}))
    place = to / ("out.gguf" if form == "gguf" else "out")
    export(plan(str(source), wanted, str(place)), lambda *_: None)
    return place


def exporting(draw: Random, folder: Path) -> tuple[str, Case]:
    """A model, often with a lie in it, written in some format and read again."""
    base = draw.choice(("plain", "gguf", *INTEGERS, *LOSSLESS))
    source = copied(base, folder)
    form, said = draw.choice(FORMATS), ""
    kind = draw.choice(TYPES[: 6 if form == "gguf" else 4]) if form in FORMATS[:2] else None
    if base == "gguf":
        source = source / "model.gguf"
        said = lies.flip(source, draw, most=1000) if draw.random() < 0.7 else said
    elif draw.random() < 0.4:
        said = lies.lie_in_tensors(draw.choice(sorted(source.glob("*.safetensors"))), draw)
    elif draw.random() < 0.7:
        name = draw.choice(("config.json", "tokenizer.json", "tokenizer_config.json"))
        data = json.loads((source / name).read_text())
        said = f"{name} {lies.lie(data, draw, 1, kinds.CONFIG_KEYS)}"
        lies.write_json(source / name, data)

    def case() -> None:
        made = write(source, folder, form, kind)
        try:
            use(made)
        except OptimError as error:
            raise WrongError(f"what was written is refused: {error.message}") from None

    return f"{base} -> {form} {kind} {said}", case


def foreign(draw: Random, folder: Path) -> tuple[str, Case]:
    """Packed integers as other programs store them."""
    base = draw.choice(FOREIGN)
    source = copied(base, folder)
    if base.endswith("gguf"):
        said = lies.flip(source / "out.gguf", draw, most=draw.choice((64, 1000, 20_000)))
        return f"{base} {said}", lambda: use(source / "out.gguf")
    if draw.random() < 0.5:
        said = lies.lie_in_tensors(source / "model.safetensors", draw, draw.randrange(1, 3))
    else:
        data = json.loads((source / "config.json").read_text())
        block = next(data[k] for k in ("quantization_config", "quantization") if k in data)
        inside = block if draw.random() < 0.8 else data
        said = lies.lie(inside, draw, draw.randrange(1, 3), BLOCK_KEYS)
        lies.write_json(source / "config.json", data)
    return f"{base} {said}", lambda: use(source)


# fmt: off
BODIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("Chat", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}),
    ("Chat", {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "n": 2}),
    ("Completion", {"prompt": ["Hi", "there"], "logprobs": 2, "stop": ["x"], "max_tokens": 3}),
    ("Completion", {"prompt": [5, 7], "seed": 1, "temperature": 0.5, "logit_bias": {"3": 1}}),
    ("Chat", {"messages": [{"role": "user", "content": "Hi"}], "tool_choice": "required", "tools": [
        {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]}),
    ("Responses", {"input": "Hi", "instructions": "Be kind", "max_output_tokens": 2}),
)
# fmt: on
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", 1]}, "b": {"pattern": "^(a|b)+$"}}}
FIELDS = ("model", "stop", "n", "tools", "tool_choice", "name", "parameters", "response_format")
FIELDS += ("logit_bias", "stream", "seed", "top_p")


def serving(draw: Random, folder: Path) -> tuple[str, Case]:
    """Bodies of HTTP requests, parsed, queued and answered for a few steps."""
    from optim.cli.serve import protocol
    from optim.cli.serve.asks import Asker
    from optim.cli.serve.errors import Refused
    from optim.runtime.engine.sampling import Sampling
    from optim.runtime.engine.scheduler import Scheduler
    from optim.runtime.engine.slots import Slots

    name, body = draw.choice(BODIES)
    body = json.loads(json.dumps(body))
    if name == "Chat" and draw.random() < 0.4:
        body["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "s", "schema": json.loads(json.dumps(SCHEMA))},
        }
    inside = body.get("response_format", body)
    said = lies.lie(inside, draw, draw.randrange(1, 3), FIELDS)
    data = json.dumps(body).encode()
    if draw.random() < 0.2:
        data = data[: draw.randrange(len(data))] + draw.choice((b"\xff", b"9" * 5000, b"[" * 5000))
    model = kinds.small_model()

    def case() -> None:
        slots = Slots(model, 3, 64)
        asker = Asker(model, slots, "plain", Sampling(max_tokens=4))
        try:
            sequences = asker.ask(getattr(protocol, name), data).sequences
        except Refused as problem:
            raise OptimError(problem.message, problem.code) from None
        loop = Scheduler(slots)
        for sequence in sequences:
            loop.submit(sequence)
        for _ in range(12):
            loop.step()
        if loop.failures:
            raise loop.failures[0]

    return f"{name} {said} {data[:40]!r}", case


EXCHANGES: dict[str, Kind] = {"export": exporting, "foreign": foreign, "serve": serving}
