"""`gguf`: one file for llama.cpp and what is built on it.

Integers go into Q4_0, Q4_1 or Q8_0 blocks as they are; what is no integer is written as it is
stored, or as `type` says. Header and tensor table first, then one tensor at a time.
"""

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType as Type
from gguf import GGUFWriter

from optim.export.exporter import Held, Plan, Progress, Prove
from optim.export.gguf import families, layout, tokenizer
from optim.export.gguf.modelfile import modelfile, place_of
from optim.export.gguf.rope import rope
from optim.recipes.schema import Export
from optim.runtime.architecture.shape import Shape, resolve
from optim.runtime.architecture.table import FAMILIES
from optim.runtime.storage.dense_view import PlainView
from optim.runtime.storage.workspace import disk_error
from optim.runtime.system.files import replace_text, sync
from optim.runtime.system.output import MARK

FILE_TYPES = {Kind.F32: 0, Kind.F16: 1, Kind.Q4_0: 2, Kind.Q4_1: 3, Kind.Q8_0: 7, Kind.Q5_0: 8}
FILE_TYPES |= {Kind.Q5_1: 9, Kind.Q2_K: 10, Kind.Q3_K: 12, Kind.Q4_K: 15, Kind.Q5_K: 17}
FILE_TYPES |= {Kind.Q6_K: 18, Kind.IQ4_NL: 25, Kind.BF16: 32}
VALUES: dict[type, tuple[Type, Type | None]] = {
    str: (Type.STRING, None),
    bool: (Type.BOOL, None),
    int: (Type.UINT32, None),
    float: (Type.FLOAT32, None),
    list: (Type.ARRAY, Type.BOOL),
}


class Gguf:
    """See Exporter."""

    title = "a GGUF file (llama.cpp, Ollama, LM Studio)"
    suffix = ".gguf"
    keys = frozenset({"type", "pre", "modelfile"})

    def hold(self, model: PlainView, wanted: Export) -> list[Held]:
        """See Exporter."""
        model = model.with_integers()
        row, shape = families.row_of(model), _shape(model)
        families.check(model, shape, row)
        rope(model, shape, row)
        if tokenizer.gguf_source(model) is None:
            tokenizer.made(model, shape.vocab, wanted.pre)
        found = layout.tensors(model, shape, row, wanted.type)
        return [item for tensor in found for item in layout.held(model, tensor)]

    def write(self, made: Plan, progress: Progress, prove: Prove | None = None) -> int:
        """See Exporter."""
        made.checkpoint.file_hashes()
        unfinished = made.output.with_name(f"{made.output.stem}.unfinished{self.suffix}")
        try:
            made.output.parent.mkdir(parents=True, exist_ok=True)
            nbytes = _write(made, unfinished, progress)
            sync(unfinished)
            if prove is not None:
                prove(unfinished)  # the file has no place for what is found: the report has it
            made.checkpoint.require_unchanged()
            if made.wanted.modelfile:
                replace_text(place_of(made.output), modelfile(made.checkpoint, made.output))
            os.replace(unfinished, made.output)
        except OSError as error:
            raise disk_error(made.output, error) from error
        finally:
            unfinished.unlink(missing_ok=True)
        return nbytes


def _shape(model: PlainView) -> Shape:
    return resolve(model.checkpoint.settings, FAMILIES[model.checkpoint.family].decoder)


def _write(made: Plan, path: Path, progress: Progress) -> int:
    model = made.model.with_integers()
    row, shape = families.row_of(model), _shape(model)
    keys, tables = rope(model, shape, row)
    found = layout.tensors(model, shape, row, made.wanted.type)
    writer = GGUFWriter(path, row.arch)
    try:
        _add_keys(writer, made, families.metadata(model, shape, row) | keys, found)
        for name, table in tables.items():
            writer.add_tensor_info(name, table.shape, np.dtype(np.float32), table.nbytes)
        for tensor in found:
            kind, shape_ = tensor.kind, tensor.byte_shape
            writer.add_tensor_info(tensor.name, shape_, np.dtype(np.uint8), tensor.nbytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for table in tables.values():
            writer.write_tensor_data(table.numpy())
        block = ""
        for at, tensor in enumerate(found, 1):
            writer.write_tensor_data(layout.content(model, tensor))
            now = ".".join(tensor.name.split(".")[:2])
            if now != block or at == len(found):
                progress(at, len(found), now)
            block = now
    finally:
        writer.close()
    return sum(tensor.nbytes for tensor in found)


def _add_keys(
    writer: GGUFWriter, made: Plan, keys: dict[str, Any], found: list[layout.FileTensor]
) -> None:
    arch = writer.arch
    pairs: tokenizer.Pairs = {
        MARK: (version("optim-llm"), Type.STRING, None),
        "general.type": ("model", Type.STRING, None),
        "general.name": (made.checkpoint.name, Type.STRING, None),
    }
    pairs |= {f"{arch}.{key}": (value, *VALUES[type(value)]) for key, value in keys.items()}
    source = tokenizer.gguf_source(made.model)
    if source is None:
        pairs |= tokenizer.made(made.model, _shape(made.model).vocab, made.wanted.pre)
    else:
        pairs |= tokenizer.copied(source) | {MARK: pairs[MARK]}
    for key, (value, kind, inner) in pairs.items():
        if kind != Type.ARRAY or value:  # the package writes no empty list
            writer.add_key_value(key, value, kind, inner)
    sizes: dict[Kind, int] = {}
    for tensor in found:
        sizes[tensor.kind] = sizes.get(tensor.kind, 0) + tensor.nbytes
    writer.add_file_type(FILE_TYPES[max(sizes, key=lambda kind: sizes[kind])])
    writer.add_quantization_version(2)
