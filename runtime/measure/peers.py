"""Other engines, measured beside ours: transformers in bf16, llama.cpp where it is installed."""

import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from optim.recipes.errors import MACHINE, USAGE, OptimError
from optim.runtime.measure.job import Job
from optim.runtime.storage.checkpoint import Checkpoint, require_plain
from optim.runtime.storage.open import open_checkpoint
from optim.runtime.system.devices import pick_device


class Transformers:
    """transformers' own `generate`, in bf16."""

    def __init__(self, job: Job) -> None:
        device = pick_device(job.device)
        self._model = _bf16_model(open_checkpoint(job.source)).to(device)
        self.place = f"{device.type}, {torch.get_num_threads()} threads, bf16"
        self.weight_bytes = sum(
            p.nbytes for n, p in self._model.named_parameters() if "embed" not in n
        )
        if self._model.config.tie_word_embeddings:
            self.weight_bytes += self._model.get_input_embeddings().weight.nbytes

    def run(self, prompt: int, new: int, batch: int) -> tuple[float, float]:
        ids = torch.randint(10, self._model.config.vocab_size, (batch, prompt))
        ids = ids.to(self._model.device)
        prefill = self._generate(ids, 1)
        return prefill, self._generate(ids, new + 1) - prefill

    def _generate(self, ids: torch.Tensor, count: int) -> float:
        start = time.perf_counter()
        self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=count,
            pad_token_id=0,
        )
        if ids.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start


def _bf16_model(checkpoint: Checkpoint) -> Any:
    from transformers import AutoModelForCausalLM

    require_plain(checkpoint)
    if any(checkpoint.folder.glob("*.safetensors")) or any(checkpoint.folder.glob("*.bin")):
        model: Any = AutoModelForCausalLM
        return model.from_pretrained(checkpoint.folder, dtype=torch.bfloat16).eval()
    factory: Any = AutoModelForCausalLM
    with torch.device("meta"):
        made = factory.from_config(checkpoint.hf_config(), dtype=torch.bfloat16)
    made = made.to_empty(device="cpu")
    made.init_weights()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            weight.copy_(checkpoint.read(name))
    return made.eval()


class LlamaCpp:
    """llama.cpp through `llama-cpp-python`; runs the .gguf file itself."""

    def __init__(self, job: Job) -> None:
        try:
            llama_cpp: Any = import_module("llama_cpp")
        except ImportError as error:
            fix = "pip install llama-cpp-python (it is compiled on this machine: minutes)"
            raise OptimError("llama-cpp-python is not installed", fix, MACHINE) from error
        path = gguf_file(job.source)
        threads = job.threads or torch.get_num_threads()
        self._model = llama_cpp.Llama(
            str(path),
            n_ctx=max(job.prompt_tokens) + job.new_tokens + 1,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
        self.place = f"cpu, {threads} threads, {path.name}"
        self.weight_bytes = path.stat().st_size

    def run(self, prompt: int, new: int, batch: int) -> tuple[float, float]:
        if batch != 1:
            raise OptimError("the llama.cpp peer runs one text at a time", "--batch 1", USAGE)
        ids = torch.randint(10, self._model.n_vocab(), (prompt,)).tolist()
        self._model.reset()
        start = time.perf_counter()
        self._model.eval(ids)
        middle = time.perf_counter()
        for token in torch.randint(10, self._model.n_vocab(), (new,)).tolist():
            self._model.eval([token])
        return middle - start, time.perf_counter() - middle


def gguf_file(source: str) -> Path:
    """The file that `source` is. OptimError (2) if it is no .gguf file."""
    path = next(iter(open_checkpoint(source).store.files), None)
    if path is None or path.suffix != ".gguf":
        raise OptimError(f"{source} is no .gguf file", "give one with --against", USAGE)
    return Path(path)
