"""Other packages' quantization of `demo` on the same tokens, for benchmarks/quality.py.

Each leaves a folder that `optim` reads. A package that is not installed is no row of the table.
"""

import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.storage.open import open_checkpoint

ITERATIONS = 200  # AutoRound's own default


@contextmanager
def timed(name: str) -> Iterator[None]:
    """Print what the body took."""
    start, cpu = time.monotonic(), time.process_time()
    yield
    wall, used = time.monotonic() - start, time.process_time() - cpu
    print(f"# {name}: {wall:.0f} s wall, {used:.0f} s CPU", flush=True)


def llm_compressor(bits: int, group: int, sym: bool, windows: Tensor, folder: Path) -> Path:
    """llm-compressor's AWQ with the settings of its examples, at our group size."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.cuda.is_available():  # it pins memory for a device that is not there
        IntermediatesCache.pin_memory = lambda *args, **kwargs: None
    out = folder / f"llm-compressor-{bits}-g{group}"
    args = QuantizationArgs(num_bits=bits, symmetric=sym, strategy="group", group_size=group)
    scheme = {"group_0": QuantizationScheme(targets=["Linear"], weights=args)}
    rows = {"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()}
    model = plain_model(folder)
    with timed(out.name):
        oneshot(
            model=model,
            dataset=Dataset.from_dict(rows),
            recipe=[AWQModifier(ignore=["lm_head"], config_groups=scheme)],
            max_seq_length=windows.shape[1],
            num_calibration_samples=len(windows),
        )
        model.save_pretrained(out, save_compressed=True)
    open_checkpoint("demo").write_sidecars(out)
    return out


def auto_round(bits: int, group: int, sym: bool, windows: Tensor, folder: Path) -> Path:
    """AutoRound at its defaults and our group size; its weights are written as bf16.

    They are multiples of their scales, so what is measured is what it would pack.
    """
    from auto_round import AutoRound
    from torch.utils.data import DataLoader
    from transformers import AutoTokenizer

    out, batch = folder / f"auto-round-{bits}-g{group}", 8
    model = plain_model(folder)
    loader: Any = DataLoader(windows, batch_size=batch, collate_fn=torch.stack)  # type: ignore[arg-type]
    with timed(out.name):
        rounder = AutoRound(
            model,
            AutoTokenizer.from_pretrained(folder / "plain"),
            scheme={"bits": bits, "group_size": group, "sym": sym, "data_type": "int"},
            dataset=loader,
            iters=ITERATIONS,
            seqlen=windows.shape[1],
            nsamples=len(windows),
            batch_size=batch,
            device_map="cuda" if torch.cuda.is_available() else "cpu",
        )
        rounded, _ = rounder.quantize()
    rounded.to(torch.bfloat16).save_pretrained(out)
    open_checkpoint("demo").write_sidecars(out)
    return out


def plain_model(folder: Path) -> Any:
    """`demo` as transformers loads it, from an ordinary folder beside the others."""
    from transformers import AutoModelForCausalLM

    source = folder / "plain"
    if not source.is_dir():
        write_plain(open_checkpoint("demo"), source)
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)


def write_plain(checkpoint: Checkpoint, folder: Path) -> None:
    """The model as an ordinary Hugging Face folder."""
    folder.mkdir()
    tensors = {checkpoint.disk_name(n): checkpoint.read(n) for n in checkpoint.tensors}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(checkpoint.config))
    checkpoint.write_sidecars(folder)


@dataclass(frozen=True, slots=True)
class Peer:
    """A package, and how it quantizes: bits, group, sym, windows, folder -> the folder it made."""

    package: str
    make: Callable[[int, int, bool, Tensor, Path], Path]


PEERS = {
    "llm-compressor": Peer("llmcompressor", llm_compressor),
    "auto-round": Peer("auto_round", auto_round),
}


def installed() -> list[str]:
    """The peers whose packages are here."""
    return [name for name, peer in PEERS.items() if importlib.util.find_spec(peer.package)]
