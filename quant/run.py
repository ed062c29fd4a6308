"""`optim quantize`: block after block through the solver into the artifact.

The calibration states after block i are written to `states-<i+1>` in the workspace before block i
is journalled, so a killed run finds both the shard and the inputs of the next block.
"""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optim.quant.finish import finish
from optim.quant.plan import Plan, plan
from optim.quant.solver import Progress, Task
from optim.quant.stored import packed_head
from optim.recipes.errors import OptimError
from optim.recipes.schema import Guided, Recipe
from optim.runtime.engine.load import Model, load_model
from optim.runtime.engine.sampling import Sampling
from optim.runtime.engine.scheduler import write
from optim.runtime.engine.sequence import Request, Sequence
from optim.runtime.engine.slots import Slots
from optim.runtime.formats.pack_quantized import Scheme
from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.storage.gate import read_finite
from optim.runtime.storage.manifest import Cost
from optim.runtime.storage.workspace import Prove, Workspace, identity
from optim.runtime.system.hashes import file_sha256, tensor_sha256, tokens_sha256
from optim.runtime.system.team import Team, join, need_share
from optim.runtime.system.torchrun import need_one, processes
from optim.runtime.text.self_generated import Generate
from optim.runtime.text.windows import windows_for
from optim.runtime.walk.walk import HiddenStates, Walk

__all__ = ["Report", "plan", "quantize"]

SMALL = 64 * 2**20  # tensors outside the blocks below this many bytes share a shard


@dataclass(frozen=True, slots=True)
class Report:
    """What was made: for the screen and `--json`."""

    output: str
    output_bytes: int
    bits_per_weight: float
    seconds: float
    peak_memory_bytes: int
    resumed: bool
    """Whether an earlier run has done a part: seconds and memory are then of the rest."""
    blocks: list[dict[str, Any]]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """A plain dictionary."""
        return asdict(self)


def quantize(
    made: Plan, progress: Progress, windows: Tensor | None = None, prove: Prove | None = None
) -> Report:
    """Carry out a plan; resumes an unfinished run of the same plan.

    `windows` int64 `[n, length]` are calibration tokens to use in place of the recipe's. `prove`
    measures the result before it gets its name.

    Under torchrun this is the first process, and the others `assist`.

    Raises OptimError: 2 for input that turns out to be bad (the workspace is removed), 4 where the
    machine gave out (the workspace stays, and the same command goes on).
    """
    start = time.monotonic()
    _refuse_team(made)
    if windows is None:
        windows = _calibrate(made)
    else:
        made = replace(made, recipe=_given(made.recipe, windows))
    recipe = made.recipe.model_dump(mode="json", exclude={"model", "output"})
    tokens = None if windows is None else tokens_sha256(windows)
    what = identity(made.checkpoint, recipe, tokens)
    what |= {"processes": processes()} if processes() > 1 else {}
    workspace = Workspace(made.output, what, made.force, made.checkpoint)
    with workspace:
        with join(made.walk.device) as team:
            shared = (windows, workspace.folder, workspace.done)
            if windows is not None:
                need_share(team, len(windows))
            team.share(shared)
            with torch.inference_mode():
                job = _Job(made, team, *shared, workspace, progress)
                job.run()
        facts = finish(made, workspace, windows, job.solver)
        cost = Cost.since(start)
        workspace.publish(prove, cost)
    return Report(
        output=str(made.output),
        output_bytes=facts["bytes"],
        bits_per_weight=facts["bits_per_weight"],
        seconds=cost.seconds,
        peak_memory_bytes=cost.peak_memory_bytes,
        resumed=workspace.resumed,
        blocks=facts["blocks"],
        notes=[*made.notes, *facts["notes"]],
    )


def assist(made: Plan) -> None:
    """The other processes' part of `quantize`: their share of each block. The first one writes."""
    _refuse_team(made)
    with join(made.walk.device) as team:
        windows, folder, done = team.share(None)
        with torch.inference_mode():
            _Job(made, team, windows, folder, done).run()


def _refuse_team(made: Plan) -> None:
    section = made.recipe.quantize
    if section is not None and not isinstance(section, Guided):
        fix = "run it without torchrun; awq and gptq can share theirs"
        need_one(f"method {section.method}", fix)


def _given(recipe: Recipe, windows: Tensor) -> Recipe:
    """The recipe as it was carried out on tokens that came from elsewhere."""
    samples, length = windows.shape
    facts = {"dataset": "given tokens", "num_samples": samples, "seq_len": length}
    calibration = recipe.calibration.model_copy(update=facts)
    return recipe.model_copy(update={"calibration": calibration})


def _calibrate(made: Plan) -> Tensor | None:
    if not made.method.reads_text:
        return None
    calibration, write = made.recipe.calibration, None
    if calibration.dataset == "self":
        write = _generator(made.checkpoint, str(made.walk.device))
    return windows_for(calibration, made.checkpoint.tokenizer(), write)


def _generator(checkpoint: Checkpoint, device: str) -> Generate:
    """A sampler (prompt ids, count, seed) -> new ids, that loads the model when first called."""
    loaded: list[Model] = []

    def written(prompt: list[int], count: int, seed: int) -> list[int]:
        if not loaded:
            loaded.append(load_model(checkpoint, device=device))
        sampling = Sampling(temperature=1.0, top_p=0.95, max_tokens=count, seed=seed)
        model = loaded[0]
        text = Sequence(model, Request(prompt, sampling), model.max_context)
        for _ in write(text, Slots(model, 1, model.max_context)):
            pass
        return text.history[len(prompt) :]

    return written


class _Job:
    """The walk over the blocks and what stands outside them.

    Each process of a team takes its part of the windows; only the first has the `workspace`, whose
    folder is `folder` and whose journal is `done`.
    """

    def __init__(
        self,
        made: Plan,
        team: Team,
        windows: Tensor | None,
        folder: Path,
        done: list[dict[str, Any]],
        workspace: Workspace | None = None,
        progress: Progress = lambda at, total, text: None,
    ) -> None:
        self.made, self.team, self.folder, self.done = made, team, folder, len(done)
        self.workspace, self.progress = workspace, progress
        self.hashes: dict[str, str] = {}
        walk = made.walk
        self.walk = Walk(walk.checkpoint, walk.device, walk.dtype, read=self._read)
        first = next(iter(made.schemes))
        names = made.checkpoint.tensors
        weight = f"{first}.weight" if f"{first}.weight" in names else next(iter(names))
        self.dtype = names[weight].dtype
        progress(0, len(self.walk), "beginning")
        self.solver = made.method.begin(
            Task(
                recipe=made.recipe,
                checkpoint=made.checkpoint,
                walk=self.walk,
                schemes=made.schemes,
                dtype=self.dtype,
                windows=windows,
                folder=folder,
                progress=progress,
                done=done,
                team=team,
            )
        )
        self.windows = self.solver.windows
        if self.windows is not None:
            self.windows = self.windows[team.part(len(self.windows))]
        self.outer = _outer_shards(made.checkpoint, self.walk.prefix, made.schemes)
        self.count = len(self.walk) + len(self.outer)

    def run(self) -> None:
        """Do every step that is not journalled yet."""
        done, blocks = self.done, len(self.walk)
        if not done:
            checkpoint = self.made.checkpoint
            for name in (name for names in self.outer for name in names):
                if name in checkpoint.tensors:  # a tied head is the embedding
                    read_finite(checkpoint.read, name)
        states = self._states(done) if self.windows is not None and done < blocks else None
        self.hashes.clear()
        for i in range(done, blocks):
            states = self._block(i, states)
        for k in range(max(0, done - blocks), len(self.outer) if self.workspace else 0):
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
            self.solver.enter(states)
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
        return self.folder / f"states-{i}{self.team.ending}"

    def _block(self, i: int, states: HiddenStates | None) -> HiddenStates | None:
        solved, after = self.solver.solve(i, states), None
        if states is not None:
            after = HiddenStates(self._states_path(i + 1), states.shape, states.dtype)
            for rows in self.walk.slices(states):
                after[rows] = self.walk.run(i, solved.block, states[rows])
        kept = {} if after is None else {after.path.name: file_sha256(after.path)}
        everyones = self.team.gather(kept)
        if self.workspace is not None:
            record = self._write(i, self.solver.tensors(solved.block, f"{self.walk.prefix}.{i}."))
            record |= {"error": solved.error, "rounding_error": solved.rounding_error}
            record |= {"held_back": solved.held_back} if solved.held_back else {}
            if after is not None:
                record["states"] = {n: sha256 for part in everyones for n, sha256 in part.items()}
            self.workspace.commit(record | {"notes": [f"block {i}: {n}" for n in solved.notes]})
        self.team.share(None)  # journalled: what was read is not needed again
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
                tensors |= packed_head(
                    module, self._read(source), self.made.schemes[module], self.dtype
                )
            else:
                tensors[checkpoint.disk_name(name)] = self._read(name)
        record = self._write(len(self.walk) + k, tensors)
        assert self.workspace is not None
        self.workspace.commit(record | {"notes": []})

    def _write(self, step: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
        assert self.workspace is not None
        name = f"model-{step + 1:05d}-of-{self.count:05d}.safetensors"
        record = self.workspace.write_shard(name, tensors)
        record["originals"], self.hashes = self.hashes, {}
        return record


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
