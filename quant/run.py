"""`optim quantize`: block after block through the solver into the artifact.

The calibration states after block i are written to `states-<i+1>` in the workspace before block i
is journalled, so a killed run finds both the shard and the inputs of the next block.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optim.quant.block_solver import BlockSolver, Solved
from optim.quant.finish import finish
from optim.quant.grid import nearest
from optim.quant.mergequant.solver import MergeSolver
from optim.quant.mergequant.stored import merge_solver, static_config, static_tensors
from optim.quant.plan import Plan, plan
from optim.quant.rounding import RoundedLinear
from optim.recipes.errors import OptimError
from optim.recipes.schema import MergeQuant, Recipe, Rtn
from optim.runtime.engine.load import Model, load_model
from optim.runtime.engine.sampling import Sampling
from optim.runtime.engine.session import generate
from optim.runtime.formats.pack_quantized import Scheme, pack
from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.storage.workspace import Workspace, identity, tensor_sha256
from optim.runtime.system.machine import peak_bytes
from optim.runtime.text.self_generated import Generate
from optim.runtime.text.windows import token_hash, windows_for
from optim.runtime.walk.walk import HiddenStates, StoredLinear, Walk

__all__ = ["Report", "plan", "quantize"]

Progress = Callable[[int, int, str], None]
SMALL = 64 * 2**20  # tensors outside the blocks below this many bytes share a shard


@dataclass(frozen=True, slots=True)
class Report:
    """What was made: for the screen and `--json`."""

    output: str
    output_bytes: int
    bits_per_weight: float
    seconds: float
    peak_memory_bytes: int
    blocks: list[dict[str, Any]]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """A plain dictionary."""
        return asdict(self)


def quantize(made: Plan, progress: Progress, windows: Tensor | None = None) -> Report:
    """Carry out a plan; resumes an unfinished run of the same plan.

    `windows` int64 `[n, length]` are calibration tokens to use in place of the recipe's.

    Raises OptimError: 2 for input that turns out to be bad (the workspace is removed), 4 where the
    machine gave out (the workspace stays, and the same command goes on).
    """
    start = time.monotonic()
    if windows is None:
        windows = _calibrate(made)
    else:
        made = replace(made, recipe=_given(made.recipe, windows))
    recipe = made.recipe.model_dump(mode="json", exclude={"model", "output"})
    tokens = None if windows is None else token_hash(windows)
    what = identity(made.checkpoint.fingerprint(), recipe, tokens)
    workspace = Workspace(made.output, what, made.force)
    with workspace:
        with torch.inference_mode():
            job = _Job(made, workspace, windows, progress)
            job.run()
        facts = finish(made, workspace, windows, job.static)
    return Report(
        output=str(made.output),
        output_bytes=facts["bytes"],
        bits_per_weight=facts["bits_per_weight"],
        seconds=time.monotonic() - start,
        peak_memory_bytes=peak_bytes(),
        blocks=facts["blocks"],
        notes=[*made.notes, *facts["notes"]],
    )


def _given(recipe: Recipe, windows: Tensor) -> Recipe:
    """The recipe as it was carried out on tokens that came from elsewhere."""
    samples, length = windows.shape
    facts = {"dataset": "given tokens", "num_samples": samples, "seq_len": length}
    calibration = recipe.calibration.model_copy(update=facts)
    return recipe.model_copy(update={"calibration": calibration})


def _calibrate(made: Plan) -> Tensor | None:
    if isinstance(made.recipe.quantize, Rtn):
        return None
    calibration, write = made.recipe.calibration, None
    if calibration.dataset == "self":
        write = _generator(made.checkpoint, str(made.walk.device))
    return windows_for(calibration, made.checkpoint.tokenizer(), write)


def _generator(checkpoint: Checkpoint, device: str) -> Generate:
    """A sampler (prompt ids, count, seed) -> new ids, that loads the model when first called."""
    loaded: list[Model] = []

    def write(prompt: list[int], count: int, seed: int) -> list[int]:
        if not loaded:
            loaded.append(load_model(checkpoint, device=device))
        sampling = Sampling(temperature=1.0, top_p=0.95, max_tokens=count, seed=seed)
        return list(generate(loaded[0], prompt, sampling))

    return write


class _Job:
    """The walk over the blocks and what stands outside them."""

    def __init__(
        self, made: Plan, workspace: Workspace, windows: Tensor | None, progress: Progress
    ) -> None:
        self.made, self.workspace, self.windows = made, workspace, windows
        self.progress = progress
        self.hashes: dict[str, str] = {}
        walk = made.walk
        self.walk = Walk(walk.checkpoint, walk.device, walk.dtype, read=self._read)
        first = next(iter(made.schemes))
        names = made.checkpoint.tensors
        weight = f"{first}.weight" if f"{first}.weight" in names else next(iter(names))
        self.dtype = names[weight].dtype
        self.solver, self.static = self._solver()
        self.outer = _outer_shards(made.checkpoint, self.walk.prefix, made.schemes)
        self.count = len(self.walk) + len(self.outer)

    def _solver(self) -> tuple[BlockSolver | MergeSolver, dict[str, Any] | None]:
        """What solves a block, and the configuration of static integers where it makes them."""
        recipe = self.made.recipe.quantize
        assert recipe is not None
        if not isinstance(recipe, MergeQuant):
            return BlockSolver(self.walk, recipe, self.made.schemes, self.dtype), None
        assert self.windows is not None
        self.progress(0, len(self.walk), "looking for outlier tokens")
        solver, prefix, self.windows = merge_solver(
            recipe, self.made.checkpoint, self.walk, self.windows, self.workspace.folder
        )
        return solver, static_config(recipe, self.made.schemes, prefix)

    def run(self) -> None:
        """Do every step that is not journalled yet."""
        done = len(self.workspace.done)
        blocks = len(self.walk)
        states = self._states(done) if self.windows is not None and done < blocks else None
        self.hashes.clear()
        for i in range(done, blocks):
            states = self._block(i, states)
        for k in range(max(0, done - blocks), len(self.outer)):
            self._outer(k)

    def _read(self, name: str) -> Tensor:
        tensor = self.made.checkpoint.read(name)
        self.hashes[name] = tensor_sha256(tensor)
        return tensor

    def _states(self, done: int) -> HiddenStates:
        """What block `done` reads, from the start or from where the last run stopped."""
        assert self.windows is not None
        path = self._states_path(done)
        if done == 0:
            self.progress(0, len(self.walk), "embedding the calibration text")
            states = self.walk.embed(self.windows, path)
            if isinstance(self.solver, MergeSolver):
                self.solver.begin(states)
        elif not path.is_file():
            raise OptimError(
                f"{path} is missing: the unfinished run cannot go on",
                "start over with --force",
            )
        else:
            self.walk.prepare(self.windows)
            hidden = int(self.walk.model.config.get_text_config().hidden_size)
            shape = (*self.windows.shape, hidden)
            states = HiddenStates(path, (shape[0], shape[1], shape[2]), self.walk.dtype)
        self.walk.release()
        return states

    def _states_path(self, i: int) -> Path:
        return self.workspace.folder / f"states-{i}"

    def _block(self, i: int, states: HiddenStates | None) -> HiddenStates | None:
        if states is None:
            assert isinstance(self.solver, BlockSolver)
            solved = Solved(self.solver.round(i), None, None)
            after = None
        else:
            solved = self.solver.solve(i, states)
            after = HiddenStates(self._states_path(i + 1), states.shape, states.dtype)
            for rows in self.walk.slices(states):
                after[rows] = self.walk.run(i, solved.block, states[rows])
        prefix = f"{self.walk.prefix}.{i}."
        if self.static is None:
            tensors = block_tensors(solved.block, prefix, self.made.checkpoint, self.dtype)
        else:
            tensors = static_tensors(solved.block, prefix, self.made.checkpoint)
        record = self._write(i, tensors)
        record |= {"error": solved.error, "rounding_error": solved.rounding_error}
        self.workspace.commit(record | {"notes": [f"block {i}: {n}" for n in solved.notes]})
        self._states_path(i).unlink(missing_ok=True)
        text = f"block {i}"
        if solved.error is not None:
            text += f" · error {solved.error:.2e} (rounding {solved.rounding_error:.2e})"
        self.progress(i + 1, len(self.walk), text)
        return after

    def _outer(self, k: int) -> None:
        tensors: dict[str, Tensor] = {}
        checkpoint = self.made.checkpoint
        for name in self.outer[k]:
            module = name.removesuffix(".weight")
            if module in self.made.schemes:
                source = (
                    name if name in checkpoint.tensors else f"{self.walk.embedding_name}.weight"
                )
                tensors |= _packed_head(
                    module, self._read(source), self.made.schemes[module], self.dtype
                )
            else:
                tensors[checkpoint.disk_name(name)] = self._read(name)
        record = self._write(len(self.walk) + k, tensors)
        self.workspace.commit(record | {"notes": []})

    def _write(self, step: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
        name = f"model-{step + 1:05d}-of-{self.count:05d}.safetensors"
        record = self.workspace.write_shard(name, tensors)
        record["originals"], self.hashes = self.hashes, {}
        return record


def block_tensors(
    block: nn.Module, prefix: str, checkpoint: Checkpoint, dtype: torch.dtype
) -> dict[str, Tensor]:
    """What is stored of a solved block, by published name: packed linears, the rest as it was."""
    tensors: dict[str, Tensor] = {}
    owned: set[str] = set()
    for name, module in block.named_modules():
        if not isinstance(module, StoredLinear):
            continue
        owned |= {f"{name}.weight", f"{name}.bias"}
        stored = checkpoint.disk_name(f"{prefix}{name}.weight").removesuffix(".weight")
        if isinstance(module, RoundedLinear):
            tensors |= {f"{stored}.{k}": v for k, v in packed(module, dtype).items()}
        else:
            info = checkpoint.tensors[f"{prefix}{name}.weight"]
            tensors[f"{stored}.weight"] = module.dense().to(info.dtype).cpu()
        bias = module.dense_bias()
        if bias is not None:
            info = checkpoint.tensors[f"{prefix}{name}.bias"]
            tensors[f"{stored}.bias"] = bias.to(info.dtype).cpu()
    for name, parameter in block.named_parameters():
        if name not in owned:
            info = checkpoint.tensors[prefix + name]
            tensors[checkpoint.disk_name(prefix + name)] = parameter.detach().to(info.dtype).cpu()
    return tensors


def packed(linear: RoundedLinear, dtype: torch.dtype) -> dict[str, Tensor]:
    """The stored tensors of a rounded linear."""
    grid = linear.grid
    zero = None if grid.scheme.symmetric else grid.zero.to(torch.uint8).cpu()
    return pack(linear.weight.detach().cpu(), grid.scale.to(dtype).cpu(), zero, grid.scheme)


def _packed_head(
    module: str, weight: Tensor, scheme: Scheme, dtype: torch.dtype
) -> dict[str, Tensor]:
    """A head rounded plainly, some rows at a time: it is the largest tensor of many models."""
    parts = [nearest(rows.float(), scheme, dtype) for rows in torch.split(weight, 8192)]
    q = torch.cat([part.to(torch.uint8) for part, _ in parts])
    scale, zero = (torch.cat([getattr(g, k) for _, g in parts]) for k in ("scale", "zero"))
    stored = pack(q, scale.to(dtype), None if scheme.symmetric else zero.to(torch.uint8), scheme)
    return {f"{module}.{key}": value for key, value in stored.items()}


def _outer_shards(
    checkpoint: Checkpoint, prefix: str, schemes: dict[str, Scheme]
) -> list[list[str]]:
    """Tensors outside the blocks, the small ones together, each large one alone."""
    names = [n for n in checkpoint.tensors if not n.startswith(prefix + ".")]
    heads = [f"{m}.weight" for m in schemes if not m.startswith(prefix + ".")]
    alone = [n for n in names if checkpoint.tensors[n].nbytes >= SMALL or n in heads]
    small = [n for n in names if n not in alone]
    tied = [n for n in heads if n not in names]
    return [*([small] if small else []), *([n] for n in [*alone, *tied])]
