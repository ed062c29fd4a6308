"""KL of llama.cpp's logits on an exported GGUF file from the fp32 model that its weights stand for.

    python benchmarks/gguf_logits.py ARTIFACT [--type q8_0] [--tokens 512]

ARTIFACT is exported to a GGUF file, which llama-cpp-python runs, and to a plain folder in float32,
which our decoder runs in float32. The text is builtin:eval. What is left is what llama.cpp adds: it
rounds activations to 8 bits a block of 32 where weights have 4, and keeps keys and values in F16.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from optim.export.run import export, plan
from optim.recipes.schema import Export
from optim.runtime.cache.full import Policy
from optim.runtime.engine.build import build
from optim.runtime.storage.open import open_checkpoint
from optim.runtime.text.documents import builtin


def main() -> None:
    asked = argparse.ArgumentParser()
    asked.add_argument("artifact")
    asked.add_argument("--type", default=None)
    asked.add_argument("--tokens", type=int, default=512)
    given = asked.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(given.artifact, given.type, given.tokens, Path(folder))


def measure(artifact: str, kind: str | None, tokens: int, folder: Path) -> None:
    """Print the divergence of both, and where most of the file's weights are."""
    made = plan(artifact, Export(format="gguf", type=kind), str(folder / "out.gguf"))
    export(made, lambda *_: None)
    plain = plan(artifact, Export(format="safetensors", type="f32"), str(folder / "plain"))
    export(plain, lambda *_: None)
    text = "\n".join(str(piece) for piece in builtin("eval"))
    ids = open_checkpoint(artifact).tokenizer().encode(text)[:tokens]
    ours, theirs = reference(folder / "plain", ids), llama_cpp(folder / "out.gguf", ids)
    p, q = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    same = (p.argmax(-1) == q.argmax(-1)).double().mean()
    error = float(kl.std()) / len(ids) ** 0.5
    for row in made.as_dict()["weights"]:
        print(
            f"{row['from']:>16} -> {row['to']:<5} {row['params']:>12,}  {row['change'] or 'none'}"
        )
    print(f"{len(ids)} tokens: KL {float(kl.mean()):.3g} +- {error:.1g}, same top {same:.2%}")


def reference(folder: Path, ids: list[int]) -> torch.Tensor:
    cpu = torch.device("cpu")
    decoder, _ = build(open_checkpoint(str(folder)), cpu, torch.float32)
    with torch.inference_mode():
        cache = decoder.new_cache(1, len(ids), cpu, None, Policy())
        return decoder(torch.tensor([ids]), cache, True)[0].clone()


def llama_cpp(file: Path, ids: list[int]) -> torch.Tensor:
    from llama_cpp import Llama

    model = Llama(str(file), n_ctx=len(ids), logits_all=True, verbose=False)
    model.eval(ids)
    return torch.from_numpy(np.array(model.scores[: len(ids)]))


if __name__ == "__main__":
    main()
