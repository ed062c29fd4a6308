"""Peak resident memory of `optim quantize` on randomly initialised models shaped like an 8B llama.

    python benchmarks/memory.py                  # 4 and 8 blocks: 2.8 and 4.6 GB of disk, a while
    python benchmarks/memory.py --blocks 1 2     # shorter, says the same

The bar: torch's own + one block + the largest other tensor + 1 GB, whatever the number of blocks.
Every figure is `ru_maxrss` of a process of its own. With --trace the resident size is printed as it
moves, so that one sees where the peak is.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, INNER, HEADS, KV_HEADS, VOCAB = 4096, 14336, 32, 8, 128256
KV = HIDDEN // HEADS * KV_HEADS
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
EMBEDDING_BYTES = 2 * VOCAB * HIDDEN
BLOCK_BYTES = 2 * sum(rows * columns for rows, columns in LINEARS.values()) + 4 * HIDDEN


def write_model(folder: Path, blocks: int) -> None:
    """One file a block, one for embeddings, one for the head; at most one of them in memory."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": blocks,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    index: dict[str, str] = {}
    for i in range(blocks):
        prefix = f"model.layers.{i}"
        part = {f"{prefix}.{name}.weight": _random(*shape) for name, shape in LINEARS.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            part[f"{prefix}.{norm}.weight"] = torch.ones(HIDDEN).bfloat16()
        _write(folder, f"block-{i}.safetensors", part, index)
    outer = {"model.embed_tokens.weight": _random(VOCAB, HIDDEN)}
    outer["model.norm.weight"] = torch.ones(HIDDEN).bfloat16()
    _write(folder, "embedding.safetensors", outer, index)
    _write(folder, "head.safetensors", {"lm_head.weight": _random(VOCAB, HIDDEN)}, index)
    weights = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(weights))
    _write_tokenizer(folder)


def _random(rows: int, columns: int) -> torch.Tensor:
    weight = torch.empty(rows, columns, dtype=torch.bfloat16)
    for part in weight.split(4096):
        part.copy_(torch.randn(part.shape) * 0.02)
    return weight


def _write(folder: Path, name: str, part: dict[str, torch.Tensor], index: dict[str, str]) -> None:
    save_file(part, folder / name, {"format": "pt"})
    index |= dict.fromkeys(part, name)


def _write_tokenizer(folder: Path) -> None:
    """One token a byte: what the text means makes no difference to memory."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def peak(command: list[str], trace: bool = False) -> int:
    """Most resident bytes that `command` had, as the kernel counted them."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    watcher = threading.Thread(target=_trace, args=(process.pid,), daemon=True)
    if trace:
        watcher.start()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss * 1024


def _trace(pid: int) -> None:
    start, last = time.monotonic(), 0.0
    while True:
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            return
        found = (line.split(":") for line in lines if "Rss" in line)
        sizes = {key[3:].lower(): int(value.split()[0]) * 1024 / 1e9 for key, value in found}
        total = sum(sizes.values())
        if abs(total - last) > 0.1:
            parts = ", ".join(f"{key} {value:.2f}" for key, value in sizes.items())
            print(f"  {time.monotonic() - start:6.1f} s  {total:.2f} GB ({parts})", flush=True)
            last = total
        time.sleep(0.1)


def measure(blocks: int, method: str, trace: bool) -> int:
    """Peak bytes of quantizing a model of `blocks` blocks."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        # In a process of its own: a child's ru_maxrss begins at what its parent once had.
        writer = multiprocessing.get_context("spawn").Process(
            target=write_model, args=(model, blocks)
        )
        writer.start()
        writer.join()
        command = [sys.executable, "-m", "optim.cli", "quantize", str(model), "-m", method]
        command += ["--num-samples", "2", "--seq-len", "256", "--device", "cpu"]
        return peak([*command, "-o", str(Path(folder) / "out")], trace)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 8])
    parser.add_argument("-m", "--method", default="awq")
    parser.add_argument("--trace", action="store_true")
    options = parser.parse_args()
    own = peak([sys.executable, "-c", "import torch"])
    bar = own + BLOCK_BYTES + EMBEDDING_BYTES + 10**9
    print(f"torch alone {own / 1e9:.2f} GB, one block {BLOCK_BYTES / 1e9:.2f} GB, ", end="")
    print(f"largest other tensor {EMBEDDING_BYTES / 1e9:.2f} GB: the bar is {bar / 1e9:.2f} GB")
    peaks = []
    for blocks in options.blocks:
        peaks.append(measure(blocks, options.method, options.trace))
        verdict = "holds" if peaks[-1] <= bar else "MISSED"
        print(f"{blocks} blocks: peak {peaks[-1] / 1e9:.2f} GB, the bar {verdict}", flush=True)
    same = max(peaks) <= 1.03 * min(peaks)
    print(f"the same for every number of blocks (within 3 %): {'yes' if same else 'NO'}")
    return 0 if max(peaks) <= bar and same else 3


if __name__ == "__main__":
    sys.exit(main())
