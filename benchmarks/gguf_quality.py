"""Files solved in GGUF's grids beside llama-quantize with an importance matrix, at equal bytes.

    python benchmarks/gguf_quality.py [--windows FILE.npz] [--types q4_0 iq4_nl] [--folder KEPT]

llama.cpp judges: KL of its own logits on each file from those on the bf16 file, over the second
half of windows of 512 tokens, as its perplexity tool has it. Both sides read the same calibration
windows; the importance matrix is the sum of squares of what each linear reads there. `demo` comes
from Q4_1, so its channels are permuted first: its old grid would favour some types.

`--windows` is an .npz with token ids: `calibration` [n, 512], and `evaluation` [m, 1024] for text
A. Without it calibration is builtin:mixed, and there is no text A. Text B is builtin:eval. What
`--folder` keeps is not made again, so that types can be added one by one.
"""

import argparse
import contextlib
import ctypes
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import llama_cpp
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import save_file
from torch import Tensor

from optim.export.gguf.families import gguf_name, row_of
from optim.export.run import export
from optim.export.run import plan as export_plan
from optim.quant.run import plan, quantize
from optim.recipes.build import build_recipe
from optim.recipes.schema import Export
from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.storage.dense_view import PlainView
from optim.runtime.storage.open import open_checkpoint
from optim.runtime.text.windows import calibration_windows, evaluation_windows
from optim.runtime.walk.walk import Walk, linears

WINDOW = 512
FILE_TYPES = {  # llama_ftype
    "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k": 12, "q4_k": 15,
    "q5_k": 17, "q6_k": 18, "iq4_nl": 25,
}  # fmt: skip


def texts(path: str | None, samples: int, count: int, model: Checkpoint) -> dict[str, Tensor]:
    """Calibration windows, and `count` windows of each text."""
    tokenizer = model.tokenizer()
    made = {"B": evaluation_windows("builtin:eval", tokenizer, window=WINDOW, max_windows=count)}
    if path is None:
        found = calibration_windows(
            "builtin:mixed", tokenizer, num_samples=samples, seq_len=WINDOW, seed=0
        )
        return {"calibration": found} | made
    data = {key: torch.from_numpy(value.astype(np.int64)) for key, value in np.load(path).items()}
    a = data["evaluation"].reshape(-1, WINDOW)[: count * 2 : 2]
    return {"calibration": data["calibration"][:samples], "A": a} | made


def permuted(source: Checkpoint, folder: Path) -> None:
    """The model in bf16, channels in another order: the same function of its tokens."""
    config, view = source.text_config, PlainView(source)
    make = torch.Generator().manual_seed(0)
    hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    heads, kv = int(config["num_attention_heads"]), int(config["num_key_value_heads"])
    dim = int(config.get("head_dim") or hidden // heads)
    wide = torch.randperm(hidden, generator=make)
    orders = {"hidden": wide, "inner": torch.randperm(inner, generator=make)}
    value = torch.randperm(dim, generator=make)
    orders |= {f"v{n}": (torch.arange(n)[:, None] * dim + value).flatten() for n in (heads, kv)}
    moves = {  # by the last parts of the names: which order of the rows, and of the columns
        "embed_tokens.weight": (None, "hidden"), "lm_head.weight": (None, "hidden"),
        "q_proj.weight": (None, "hidden"), "k_proj.weight": (None, "hidden"),
        "v_proj.weight": (f"v{kv}", "hidden"), "o_proj.weight": ("hidden", f"v{heads}"),
        "gate_proj.weight": ("inner", "hidden"), "up_proj.weight": ("inner", "hidden"),
        "down_proj.weight": ("hidden", "inner"),
    }  # fmt: skip
    tensors = {}
    for name in view.tensors:
        w = view.read(name)
        rows, columns = moves.get(".".join(name.split(".")[-2:]), ("hidden", None))
        if "q_norm" not in name and "k_norm" not in name:
            w = w if rows is None else w[orders[rows]]
            w = w if columns is None else w[:, orders[columns]]
        tensors[source.disk_name(name)] = w.to(torch.bfloat16).contiguous()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(source.config | {"dtype": "bfloat16"}))
    source.write_sidecars(folder)


def importance(model: Checkpoint, windows: Tensor) -> dict[str, Tensor]:
    """Mean x² `[in]` of what each linear reads, by its name in the file."""
    walk, row = Walk(model, torch.device("cpu")), row_of(PlainView(model))
    found: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        states = walk.embed(windows, Path(folder) / "states")
        for i in range(len(walk)):
            block = walk.block(i)
            for path, linear in linears(block).items():
                name = gguf_name(f"{walk.prefix}.{i}.{path}.weight", row.arch)
                assert name is not None
                found[name] = torch.zeros(linear.in_features)

                def add(_m: object, args: tuple[Tensor, ...], at: Tensor = found[name]) -> None:
                    at += args[0].float().flatten(0, -2).square().sum(0) / windows.numel()

                linear.register_forward_pre_hook(add)
            for rows in walk.slices(states):
                states[rows] = walk.run(i, block, states[rows])
    return found


def llama_quantize(base: Path, out: Path, kind: str, weights: dict[str, Tensor]) -> None:
    """llama-quantize with the importance matrix; embeddings in Q8_0, as the solved files have."""
    rows = (llama_cpp.llama_model_imatrix_data * (len(weights) + 1))()
    kept = []
    for at, (name, values) in enumerate(weights.items()):
        data = values.float().contiguous()
        kept += [data, name.encode()]
        pointer = ctypes.cast(data.data_ptr(), ctypes.POINTER(ctypes.c_float))
        rows[at] = llama_cpp.llama_model_imatrix_data(kept[-1], pointer, data.numel())
    given = llama_cpp.llama_model_quantize_default_params()
    given.ftype, given.nthread = FILE_TYPES[kind], os.cpu_count() or 1
    given.token_embedding_type = given.output_tensor_type = int(Kind.Q8_0)
    given.pure = kind.endswith("_k")  # its mixtures of K types have other sizes
    given.imatrix = rows
    with quiet():
        status = llama_cpp.llama_model_quantize(str(base).encode(), str(out).encode(), given)
    if status:
        raise SystemExit(f"llama_model_quantize failed on {kind}")


def solved(plain: Path, out: Path, kind: str, windows: Tensor, sets: list[str]) -> None:
    """The same type by `optim quantize --grid`, exported."""
    with tempfile.TemporaryDirectory() as folder:
        keys = {"model": str(plain), "output": f"{folder}/made", "quantize.method": "awq"}
        recipe = build_recipe(None, keys | {"quantize.grid": kind}, sets)
        quantize(plan(recipe), lambda *_: None, windows)
        to_gguf(Path(folder) / "made", out, "q8_0")


def to_gguf(source: Path, out: Path, kind: str) -> None:
    export(export_plan(str(source), Export(format="gguf", type=kind), str(out)), lambda *_: None)


def log_probs(file: Path, windows: Tensor, begin: list[int]) -> Iterator[Tensor]:
    """Of the second half of each window, `[tokens, vocabulary]`."""
    with quiet():
        model = llama_cpp.Llama(
            str(file), n_ctx=WINDOW + len(begin), n_batch=WINDOW, logits_all=True, verbose=False
        )
    for row in windows.tolist():
        model.reset()
        model.eval([*begin, *row])
        scores = model.scores[len(begin) + WINDOW // 2 : len(begin) + WINDOW]
        yield torch.from_numpy(np.array(scores)).log_softmax(-1)
    model.close()


def measure(base: list[Tensor], file: Path, windows: Tensor, begin: list[int]) -> Tensor:
    """KL of each judged token."""
    found = [
        (p.float().exp() * (p.float() - q)).sum(-1)
        for p, q in zip(base, log_probs(file, windows, begin), strict=True)
    ]
    return torch.cat(found).double()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What llama.cpp says on stderr goes nowhere."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def make(folder: Path, given: argparse.Namespace) -> tuple[dict[str, Path], dict[str, Tensor]]:
    """Every file that is not there yet, by its name; and the texts."""
    source = open_checkpoint(given.model)
    plain, base = folder / "plain", folder / "base.gguf"
    if not plain.is_dir():
        permuted(source, plain)
    if not base.is_file():
        to_gguf(plain, base, "bf16")
    read = texts(given.windows, given.samples, given.count, source)
    model = open_checkpoint(str(plain))
    weights: dict[str, Tensor] = {}
    files = {"base": base}
    for kind in given.types:
        theirs, ours = folder / f"{kind}-imatrix.gguf", folder / f"{kind}-solved{given.tag}.gguf"
        files |= {f"{kind} imatrix": theirs, f"{kind} solved{given.tag}": ours}
        if not theirs.is_file():
            weights = weights or importance(model, read["calibration"])
            llama_quantize(base, theirs, kind, weights)
        if not ours.is_file():
            solved(plain, ours, kind, read["calibration"], given.set)
    return files, read


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--model", default="demo")
    asked.add_argument("--windows")
    asked.add_argument("--types", nargs="+", default=["q4_0", "q4_1", "iq4_nl"])
    asked.add_argument("--samples", type=int, default=64, help="calibration windows")
    asked.add_argument("--count", type=int, default=40, help="windows of each text")
    asked.add_argument("--folder", help="where files are kept")
    asked.add_argument("--set", action="append", default=[], help="as quantize.damping=0.3")
    asked.add_argument("--tag", default="", help="of the solved files' names, beside --set")
    given = asked.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(given.folder or temporary)
        folder.mkdir(exist_ok=True)
        files, read = make(folder, given)
        begin = open_checkpoint(given.model).tokenizer().begin
        table(files, {text: read[text] for text in ("A", "B") if text in read}, list(begin))


def table(files: dict[str, Path], read: dict[str, Tensor], begin: list[int]) -> None:
    """A line for each file and text; `less` is how far it lies below the first file of the text."""
    for text, windows in read.items():
        base = [p.half() for p in log_probs(files["base"], windows, begin)]
        found = {n: measure(base, f, windows, begin) for n, f in files.items() if n != "base"}
        for name, kl in found.items():
            beside = found[name.split(" ")[0] + " imatrix"]
            root = len(kl) ** 0.5
            error = float((beside - kl).std()) / root / float(beside.mean())
            less = f"{1 - float(kl.mean() / beside.mean()):6.1%} +- {error:.1%}"
            print(
                f"{text} {name:<18} {files[name].stat().st_size / 1e6:7.2f} MB  "
                f"KL {float(kl.mean()):.4f} +- {float(kl.std()) / root:.4f}  below imatrix {less}",
                flush=True,
            )


if __name__ == "__main__":
    main()
