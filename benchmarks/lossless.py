"""Lossless packing beside its peers: size, speed of the codecs, memory, speed of the product.

    python benchmarks/lossless.py [--model demo] [--shaped 4,8] [--out lossless.json]

Seconds are CPU time of one thread (other programs on the machine cost no figure), the best of some
rounds; peers run on the same tensors in the same process and are left out where they are not
installed: zipnn, zstandard, and dahuffman, with which `reference` does what the published DFloat11
encoder does, in plain Python, on a sample. `--shaped` packs random models with blocks as those of
an 8B model and says what the whole command needed. Nothing here ran on a GPU.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optim.export.lossless.pack import pack
from optim.export.lossless.plan import plan
from optim.recipes.schema import Pack
from optim.runtime.formats.bf12 import PIECES
from optim.runtime.formats.dfloat11 import SUFFIXES
from optim.runtime.kernels.bf12 import planes_of, words
from optim.runtime.kernels.cpu import bf12 as cpu_bf12
from optim.runtime.kernels.cpu import bf16 as cpu_bf16
from optim.runtime.storage.lossless.dfloat11 import Unit
from optim.runtime.storage.lossless.dfloat11_encoder import Counts, Encoder
from optim.runtime.storage.lossless.store import PIECE
from optim.runtime.storage.open import open_checkpoint
from optim.runtime.storage.tensors import Part, TensorInfo

SAMPLE = 200_000  # weights that the reference encoder gets: it takes seconds for a million
CHUNK = PIECE  # weights the codecs get at a time, as when a model is packed
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (128256, 4096))
Blocks = dict[str, list[Tensor]]


def blocks_of(source: str) -> Blocks:
    """The matrices of a model in bf16, by unit."""
    units: Blocks = {}
    store = open_checkpoint(source).store
    for shard in plan(source, Pack(cast=True), "never").shards:
        for unit, names in shard.units.items():
            units[unit] = [store.read(Part(name)).to(torch.bfloat16) for name in names]
    return units


def unit_over(tensors: dict[str, Tensor]) -> Unit:
    infos = {k: TensorInfo(tuple(t.shape), t.dtype, t.nbytes) for k, t in tensors.items()}
    flat = {k: t.numpy().reshape(-1).view(np.uint8) for k, t in tensors.items()}
    return Unit("unit", infos, lambda piece, start, stop: flat[piece][start:stop])


def best(run: Callable[[], Any], rounds: int) -> float:
    """CPU seconds of the fastest round."""
    times = []
    for _ in range(rounds):
        begin = time.process_time()
        run()
        times.append(time.process_time() - begin)
    return min(times)


class Df11:
    """Count, code, encode, finish; then decode."""

    name = "optim df11"

    def compress(self, weights: Tensor) -> Any:
        counts = Counts()
        counts.add(weights)
        encoder = Encoder(counts.exponents, [])
        return [encoder.push(weights), encoder.finish()]  # what is appended to the file

    def size(self, made: Any) -> int:
        return sum(int(array.nbytes) for part in made for array in part.values())

    def prepare(self, made: Any) -> Any:
        parts = [{k: [part[k]] if k in part else [] for k in SUFFIXES} for part in made]
        whole = {k: np.concatenate([*parts[0][k], *parts[1][k]]) for k in SUFFIXES}
        return unit_over({k: torch.from_numpy(array) for k, array in whole.items()})

    def restore(self, made: Any) -> Tensor:
        return made.decode(0, made.size)  # a unit is opened once, and has many pieces


class Bf12:
    name = "optim bf12"

    def compress(self, weights: Tensor) -> Any:
        return planes_of(weights.view(-1, 64 if weights.numel() % 64 == 0 else 1))

    def size(self, made: Any) -> int:
        return sum(int(getattr(made, piece).nbytes) for piece in PIECES)

    def restore(self, made: Any) -> Tensor:
        return made[:].view(-1)


class Zipnn:
    name = "zipnn"

    def __init__(self) -> None:
        from zipnn import ZipNN

        self.codec = ZipNN(bytearray_dtype="bfloat16", threads=1)

    def compress(self, weights: Tensor) -> Any:
        return self.codec.compress(bytearray(words(weights).tobytes()))  # it changes what it gets

    def size(self, made: Any) -> int:
        return len(made)

    def restore(self, made: Any) -> Any:
        return np.frombuffer(self.codec.decompress(made), np.uint16)


class Zstd:
    """zstd -1 on the exponents, sign and mantissa as they are."""

    name = "zstd -1, exponents"

    def __init__(self) -> None:
        import zstandard

        self.writer, self.reader = zstandard.ZstdCompressor(1), zstandard.ZstdDecompressor()

    def compress(self, weights: Tensor) -> Any:
        w = words(weights)
        rest = ((w >> 8 & 0x80) | (w & 0x7F)).astype(np.uint8)
        return self.writer.compress((w >> 7).astype(np.uint8)), rest

    def size(self, made: Any) -> int:
        return len(made[0]) + made[1].nbytes

    def restore(self, made: Any) -> Any:
        e, rest = np.frombuffer(self.reader.decompress(made[0]), np.uint8), made[1]
        return (rest & np.uint16(0x80)) << 8 | e.astype(np.uint16) << 7 | rest & np.uint16(0x7F)


def reference(weights: Tensor) -> float:
    """CPU seconds of the published encoder's steps, in Python, for a sample."""
    from dahuffman import HuffmanCodec

    exponents = (words(weights) >> 7 & 0xFF).tolist()
    begin = time.process_time()
    codec = HuffmanCodec.from_frequencies({e: exponents.count(e) for e in set(exponents)})
    table = codec.get_code_table()
    stream, gaps, at, window = bytearray(), [], 0, -1
    buffer, size = 0, 0
    for exponent in exponents:
        bits, value = table[exponent]
        if at // 64 > window:
            window = at // 64
            gaps.append(at - window * 64)
        buffer, size = buffer << bits | value, size + bits
        at += bits
        while size >= 8:
            stream.append(buffer >> size - 8 & 0xFF)
            size -= 8
            buffer &= (1 << size) - 1
    return time.process_time() - begin


def codecs(blocks: Blocks, rounds: int) -> Iterator[dict[str, Any]]:
    """Size over every unit, and speed over the first CHUNK weights of the largest."""
    largest = torch.cat([t.reshape(-1) for t in max(blocks.values(), key=_weights)])[:CHUNK]
    count, found = largest.numel(), []
    for kind in (Df11, Bf12, Zipnn, Zstd):
        try:
            codec = kind()
        except ImportError:
            print(f"{kind.name} is not installed", file=sys.stderr)
            continue
        made = codec.compress(largest)
        made = codec.prepare(made) if isinstance(codec, Df11) else made
        back = codec.restore(made)
        back = back if isinstance(back, np.ndarray) else words(back)
        assert (back == words(largest)).all(), codec.name
        found.append((codec, made, [], []))
    for _ in range(rounds):  # by turns: what else the machine does hits all alike
        for codec, made, packing, unpacking in found:
            packing.append(best(partial(codec.compress, largest), 1))
            unpacking.append(best(partial(codec.restore, made), 1))
    for codec, _, packing, unpacking in found:
        yield {
            "codec": codec.name,
            "bits_per_weight": 8 * sum(stored_sizes(codec, blocks)) / total(blocks),
            "pack_weights_per_second": count / min(packing),
            "unpack_weights_per_second": count / min(unpacking),
        }
    try:
        speed = SAMPLE / min(reference(largest[:SAMPLE]) for _ in range(rounds))
        yield {"codec": "reference, Python", "pack_weights_per_second": speed}
    except ImportError:
        print("dahuffman is not installed", file=sys.stderr)


def stored_sizes(codec: Any, blocks: Blocks) -> Iterator[int]:
    for tensors in blocks.values():
        if codec.name == Bf12.name:
            for tensor in tensors:
                yield codec.size(planes_of(tensor.reshape(-1, tensor.shape[-1])))
        else:
            yield codec.size(codec.compress(torch.cat([t.reshape(-1) for t in tensors])))


def _weights(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def total(blocks: Blocks) -> int:
    return sum(map(_weights, blocks.values()))


def products(rounds: int) -> Iterator[dict[str, Any]]:
    """CPU seconds of one product over bf16 and over planes; outputs are compared first."""
    for rows, cols in SHAPES:
        weight = torch.randn(rows, cols).mul_(0.02).to(torch.bfloat16)
        planes = planes_of(weight)
        for tokens in (1, 2, 4):
            x = torch.randn(tokens, cols)
            assert torch.equal(cpu_bf16.linear(x, weight), cpu_bf12.linear(x, [planes.c]))
            times = [
                best(partial(cpu_bf16.linear, x, weight), rounds),
                best(partial(cpu_bf12.linear, x, [planes.c]), rounds),
            ]
            yield {"shape": [rows, cols], "tokens": tokens, "bf16_ms": 1e3 * times[0],
                   "bf12_ms": 1e3 * times[1], "speed_up": times[0] / times[1]}  # fmt: skip


def write_shaped(folder: Path, blocks: int) -> None:
    """An 8B-shaped model of random bf16 weights: one block's numbers in every block."""
    from safetensors.torch import save_file

    from optim.runtime.storage.workspace import index_of

    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096,
              "intermediate_size": 14336, "num_hidden_layers": blocks, "num_attention_heads": 32,
              "num_key_value_heads": 8, "vocab_size": 128256,
              "tie_word_embeddings": True}  # fmt: skip
    linears = {"self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096),
               "self_attn.v_proj": (1024, 4096), "self_attn.o_proj": (4096, 4096),
               "mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096),
               "mlp.down_proj": (4096, 14336)}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    block = {n: torch.randn(s).mul_(0.02).to(torch.bfloat16) for n, s in linears.items()}
    shards = [{f"model.layers.{i}.{n}.weight": t for n, t in block.items()} for i in range(blocks)]
    table = torch.randn(128256, 4096).mul_(0.02).to(torch.bfloat16)
    shards.append({"model.embed_tokens.weight": table, "model.norm.weight": torch.ones(4096)})
    records = []
    for i, tensors in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, folder / name)
        sizes = {key: tensor.nbytes for key, tensor in tensors.items()}
        records.append({"file": name, "tensors": sizes})
    (folder / "model.safetensors.index.json").write_text(index_of(records))


def shaped(blocks: int) -> dict[str, Any]:
    """Pack such a model in a process of its own: memory, weights a second of CPU and wall."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model"
        source.mkdir()
        subprocess.run([sys.executable, __file__, "--write", str(source), str(blocks)], check=True)
        command = [sys.executable, __file__, "--pack", str(source), str(Path(folder) / "out")]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return {"blocks": blocks} | json.loads(done.stdout.splitlines()[-1])


def pack_here(source: str, output: str) -> None:
    made = plan(source, Pack(), output)
    before = time.process_time()
    report = pack(made, lambda at, count, text: print(text, file=sys.stderr))
    largest = max(info.nbytes for info in made.checkpoint.store.infos.values())
    cpu = time.process_time() - before
    print(json.dumps({
        "weights": report.packed_weights,
        "peak_bytes": peak_memory(),
        "largest_tensor_bytes": largest,
        "weights_per_cpu_second": report.packed_weights / cpu,
        "weights_per_second": report.packed_weights / report.seconds,
    }))  # fmt: skip


def peak_memory() -> int:
    """Of this process alone: what getrusage says begins with the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def machine() -> dict[str, Any]:
    names = ("torch", "numpy", "numba", "zipnn", "zstandard", "dahuffman")
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    cpu = next((x.partition(":")[2].strip() for x in Path("/proc/cpuinfo").read_text().splitlines()
                if x.startswith("model name")), platform.machine())  # fmt: skip
    return {"date": str(date.today()), "cpu": cpu, "python": platform.python_version(),
            "load_average": os.getloadavg()[0], "versions": versions}  # fmt: skip


def show(row: dict[str, Any]) -> None:
    print(
        " · ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--model", action="append", help="a model; fp32 ones are cast to bf16")
    options.add_argument("--shaped", default="", help="block counts, like 4,8")
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--no-products", action="store_true")
    options.add_argument("--out", type=Path)
    options.add_argument("--write", nargs=2, help=argparse.SUPPRESS)
    options.add_argument("--pack", nargs=2, help=argparse.SUPPRESS)
    asked = options.parse_args()
    torch.set_num_threads(1)
    if asked.write:
        return write_shaped(Path(asked.write[0]), int(asked.write[1]))
    if asked.pack:
        return pack_here(*asked.pack)
    found: dict[str, Any] = machine() | {"models": {}, "products": [], "shaped": []}
    for model in asked.model or ([] if asked.shaped else ["demo"]):
        name = Path(model).name
        found["models"][name] = []
        for row in codecs(blocks_of(model), asked.rounds):
            show({"model": name} | row)
            found["models"][name].append(row)
    for row in () if asked.no_products else products(asked.rounds):
        show(row)
        found["products"].append(row)
    for blocks in filter(None, asked.shaped.split(",")):
        row = shaped(int(blocks))
        show(row)
        found["shaped"].append(row)
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
