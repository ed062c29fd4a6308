"""Take real models through every command: `python tests/real/run.py demo gemma-3-270m.gguf`.

Each compression uses little text; what it made is looked at, run, and measured beside the model.
Prints a row a command, with its exit code and seconds. Exit code 1 if a command failed, or if what
it made is further from the model than its kind may be. A quarter of an hour a model on two cores.
Commands of a hub are left out, and `optim rm`, which would take the model away.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1"}
OPTIM = (sys.executable, "-m", "optim.cli")
TEXT = "--num-samples 4 --seq-len 128 --no-eval"
SETS = "--set calibration.num_samples=4 --set calibration.seq_len=128"
PROMPT = "'The capital of France is' --raw --temperature 0 --max-tokens 8"
LOOK = "--window 256 --max-windows 2"
FIRST = f"""
doctor
list
recipe list
recipe show awq-w4
recipe check awq-w4
recipe schema
inspect MODEL
run MODEL {PROMPT} --speculate lookup
run MODEL {PROMPT} --kv-bits 4 --kv-policy stream
run MODEL --batch prompts.jsonl -o rows.jsonl --raw --max-tokens 8
eval MODEL {LOOK}
bench MODEL --prompt-tokens 64 --new-tokens 16 --repeat 1
quantize MODEL --dry-run
plan MODEL --bits 4 -m rtn --num-samples 4 --seq-len 128 -o mixed.yaml
"""
EXACT, BYTE, FOUR, FEW, TRAINED = 1e-5, 0.02, 1.0, 5.0, float("inf")
MADE: dict[str, tuple[str, float]] = {
    "rtn8": ("quantize MODEL -m rtn -b 8 --no-eval", BYTE),
    "rtn": ("quantize MODEL -m rtn --no-eval", FOUR),
    "mixed": ("quantize MODEL --recipe mixed.yaml --no-eval", FOUR),
    "awq": ("quantize MODEL -m awq --num-samples 4 --seq-len 128", FOUR),
    "sym": (f"quantize MODEL -m awq --sym -g 32 {TEXT}", FOUR),
    "gptq": (f"quantize MODEL -m gptq {TEXT}", FOUR),
    "grid": (f"quantize MODEL -m awq --grid q4_0 {TEXT}", FOUR),
    "static": (f"quantize MODEL -m mergequant --no-rotate --act-bits 8 {TEXT}", FEW),
    "tuned": (f"tune awq --against MODEL --epochs 1 {TEXT}", FOUR),
    "threshold": (f"prune MODEL {TEXT}", FOUR),
    "core": (f"prune MODEL -m coreinfer {TEXT}", FEW),
    "relu": (f"prune MODEL -m prosparse --steps 2 {TEXT}", TRAINED),
    "zeros": ("prune relu -m relu-exact --no-eval", TRAINED),
    "df11": ("pack MODEL", EXACT),
    "bf12": ("pack MODEL --layout bf12", EXACT),
    "unpacked": ("unpack df11", EXACT),
    "both": ("pack awq --layout bf12", FOUR),
    "plain": ("export MODEL -f safetensors --no-eval", EXACT),
    "whole.gguf": ("export MODEL --type bf16", EXACT),
    "eight.gguf": ("export MODEL --type q8_0 --no-eval", BYTE),
    "awq.gguf": ("export awq --no-eval", FOUR),
    "grid.gguf": ("export grid --no-eval", FOUR),
    "as-awq": ("export awq -f awq --no-eval", FOUR),
    "as-gptq": ("export sym -f gptq --no-eval", FOUR),
    "as-mlx": ("export awq -f mlx --no-eval", FOUR),
    "as-ct": ("export gptq -f compressed-tensors --no-eval", FOUR),
    "all": (f"apply everything MODEL {SETS} --no-eval", FOUR),
}
"""What is made: by which command, and how far it may be from the model (KL divergence, nats)."""
LAST = f"""
verify awq --against MODEL
verify threshold --against MODEL
verify df11
eval awq --against MODEL {LOOK} --record
run awq {PROMPT} --draft rtn
compare MODEL awq bf12 awq.gguf --max-windows 1
"""


class Walk:
    """A model, the folder where things are made of it, and how many rows went wrong."""

    def __init__(self, model: str, folder: Path) -> None:
        self.model, self.folder, self.wrong = model, folder, 0
        lines = [json.dumps({"prompt": text}) for text in ("One, two,", "The sea is")]
        (folder / "prompts.jsonl").write_text("\n".join(lines))

    def words(self, typed: str) -> list[str]:
        """A command line as typed, with the model in its place."""
        return [*OPTIM, *(self.model if w == "MODEL" else w for w in shlex.split(typed))]

    def row(self, typed: str, do: Callable[[], tuple[int, str]]) -> bool:
        """Do it and print its row; whether nothing was wrong."""
        begin = time.monotonic()
        code, wrong = do()
        print(f"{code:>3} {time.monotonic() - begin:6.1f} s  {typed}", flush=True)
        if wrong:
            self.wrong += 1
            print(f"    WRONG: {wrong}", flush=True)
        return not wrong

    def optim(self, typed: str) -> bool:
        """A command that has to end well."""
        return self.row(typed, lambda: self.run(typed)[:2])

    def run(self, typed: str) -> tuple[int, str, str]:
        """Exit code, what was wrong and standard output of a command."""
        done = subprocess.run(
            self.words(typed),
            cwd=self.folder,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        wrong = " ".join(done.stderr.split())[-400:] or "it failed and said nothing"
        return done.returncode, wrong if done.returncode else "", done.stdout

    def make(self, name: str, typed: str, most: float) -> None:
        """Make `name`, look at it, run it, and measure it beside the model."""
        if not self.optim(f"{typed} -o {name}"):
            return
        self.optim(f"inspect {name}" + ("" if "." in name else " --verify"))
        self.optim(f"run {name} {PROMPT}")
        self.row(f"KL of {name} at most {most:g}", lambda: self.far(name, most))

    def far(self, name: str, most: float) -> tuple[int, str]:
        """Whether `name` is further from the model than `most`."""
        code, wrong, said = self.run(f"eval {name} --against MODEL {LOOK} --json --quiet")
        if not wrong and not (kl := json.loads(said)["kl"]) <= most:
            wrong = f"its KL is {kl:.4g}"
        return code, wrong

    def serve(self) -> tuple[int, str]:
        """One completion over HTTP, and a stop."""
        words = self.words("serve MODEL --port 0 --json --quiet")
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            lines = iter(process.stdout.readline, "}\n")
            url = json.loads("".join(lines) + "}")["url"]
            body = json.dumps({"prompt": "The sea is", "max_tokens": 4}).encode()
            heads = {"Content-Type": "application/json"}
            asked = urllib.request.Request(f"{url}/v1/completions", body, heads)
            with urllib.request.urlopen(asked, timeout=60) as reply:
                text = json.load(reply)["choices"][0]["text"]
            process.terminate()
        return process.returncode, "" if text else "it answered nothing"


def walk(model: str, folder: Path) -> int:
    """Take `model` through all of it; returns how many rows went wrong."""
    made = Walk(model, folder)
    for typed in FIRST.split("\n")[1:-1]:
        made.optim(typed)
    made.row("serve MODEL", made.serve)
    for name, (typed, most) in MADE.items():
        made.make(name, typed, most)
    for typed in LAST.split("\n")[1:-1]:
        made.optim(typed)
    return made.wrong


def main() -> int:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="*", default=["demo"], help="a folder, a .gguf, or `demo`")
    wrong = 0
    for model in parser.parse_args().model:
        source = str(Path(model).absolute()) if Path(model).exists() else model
        print(f"\nMODEL is {model}", flush=True)
        with tempfile.TemporaryDirectory(prefix="optim-real-") as folder:
            wrong += walk(source, Path(folder))
    print(f"\n{wrong} rows went wrong" if wrong else "\nall rows are as they should be")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
