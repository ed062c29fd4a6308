"""Decode end to end on a GPU: a random model shaped like an 8B llama, in every form.

    python benchmarks/gpu_decode.py [--blocks 32] [--forms bf16 int4 ...] [--folder DIR]

Needs a GPU; refuses without one. Random weights are as fast as trained ones (bf12: their exponents
are those of a normal distribution). Each form is made with `optim` and measured with `optim bench
--json` in a process of its own; transformers' bf16 `generate` runs beside the first. A floor is
printed too: the bytes of weights that a token reads, over the bandwidth that bench measured.
32 blocks take 16 GB of disk for bf16 and as much again for the others.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from memory import write_model

OPTIM = [sys.executable, "-m", "optim.cli"]
MAKE = {
    "bf16": [],
    "int4": ["quantize", "MODEL", "-m", "rtn", "--group-size", "128", "--sym", "-o", "OUT"],
    "bf12": ["pack", "MODEL", "--layout", "bf12", "-o", "OUT"],
    "df11": ["pack", "MODEL", "-o", "OUT"],
}


def made(form: str, model: Path, folder: Path) -> Path:
    out = folder / form
    if MAKE[form] and not out.is_dir():
        places = {"MODEL": str(model), "OUT": str(out)}
        subprocess.run([*OPTIM, *(places.get(word, word) for word in MAKE[form])], check=True)
    return out if MAKE[form] else model


def bench(source: Path, *extra: str) -> dict[str, object]:
    command = [*OPTIM, "bench", str(source), "--device", "cuda", "--json", *extra]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, object] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--forms", nargs="+", choices=MAKE, default=list(MAKE))
    parser.add_argument("--folder", help="keep the models here")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this machine has no GPU: nothing was measured")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        model = folder / "model"
        if not model.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            write_model(model, options.blocks)
        for at, form in enumerate(options.forms):
            extra = ["--peer", "transformers", "--against", str(model)] if at == 0 else []
            found = bench(made(form, model, folder), *extra)
            peak = float(str(found["bandwidth"]))
            runs = found["runs"]
            assert isinstance(runs, list)
            for run in runs:
                floor = peak / run["weight_bytes"]
                row = {"form": form, "engine": run["engine"], "place": run["place"]}
                print(
                    json.dumps(row | {"floor_tok_s": floor, "timings": run["timings"]}), flush=True
                )


if __name__ == "__main__":
    main()
