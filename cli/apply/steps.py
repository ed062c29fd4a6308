"""Carry out a recipe of several sections: each step on what the one before it has written.

The steps' folders lie in the workspace of the output, and the last one becomes the artifact: its
small files then speak of all steps (restate.py), it is measured, and takes its name in one rename.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from optim.cli.apply.plan import Job, only
from optim.cli.apply.restate import restate
from optim.recipes.errors import OptimError
from optim.recipes.schema import Recipe

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Report:
    """What was made: for the screen and `--json`."""

    output: str
    exported: str | None
    output_bytes: int | None
    seconds: float
    peak_memory_bytes: int
    resumed: bool
    """Whether an earlier run has done a part: seconds and memory are then of the rest."""
    steps: dict[str, Any]
    evaluation: dict[str, Any] | None
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """A plain dictionary."""
        return asdict(self)


def carry_out(job: Job, progress: Progress) -> Report:
    """Do what is not done yet. Raises OptimError as the steps do."""
    from optim.runtime.storage.manifest import Manifest, read_manifest
    from optim.runtime.system.memory import peak_bytes

    start, reports, resumed = time.monotonic(), dict[str, Any](), True
    if job.how.force or not job.is_there:
        resumed = _make(job, progress, reports)
    if job.exported is not None:
        source, place = str(job.output), str(job.exported)
        made = only(job.recipe, "export", source, place)
        reports["export"] = _export(made, job, _said("export", progress))
    manifest = read_manifest(job.output) or Manifest()
    return Report(
        output=str(job.output),
        exported=None if job.exported is None else str(job.exported),
        output_bytes=manifest.bytes,
        seconds=time.monotonic() - start,
        peak_memory_bytes=peak_bytes(),
        resumed=resumed,
        steps=reports,
        evaluation=manifest.evaluation,
        notes=list(dict.fromkeys(n for report in reports.values() for n in report["notes"])),
    )


def _make(job: Job, progress: Progress, reports: dict[str, Any]) -> bool:
    """Make the artifact; whether a step of it was there already."""
    from optim.runtime.storage.workspace import KEPT, Workspace, identity
    from optim.runtime.system.hashes import text_sha256

    what = identity(job.original, job.stated, _text(job))
    workspace = Workspace(job.output, what, job.how.force, job.original)
    with workspace:
        folder = workspace.folder / KEPT / text_sha256(repr(what))[:12]
        folder.mkdir(parents=True, exist_ok=True)
        resumed = bool(workspace.done) or any(folder.iterdir())
        if not workspace.done:
            _run_steps(job, folder, progress, reports)
            _finish(job, folder, progress, reports, resumed)
            # From here the folder is whole: a run that is killed has only to give it its name.
            workspace.commit({"tensors": {}})
        last = folder / job.steps[-1]
        if last.is_dir():
            workspace.files.rmdir()
            os.replace(last, workspace.files)
        for step in job.steps[:-1]:
            if job.keep and (folder / step).is_dir():
                os.replace(folder / step, job.kept(step))
        workspace.publish()
    return resumed


def _text(job: Job) -> str | None:
    """The hash of the calibration tokens, so that another text is another run."""
    from optim.runtime.system.hashes import tokens_sha256
    from optim.runtime.text.windows import windows_for

    calibration = job.recipe.calibration
    if calibration.dataset == "self" or not {"quantize", "prune"} & {*job.steps}:
        return None
    return tokens_sha256(windows_for(calibration, job.original.tokenizer()))


def _run_steps(job: Job, folder: Path, progress: Progress, reports: dict[str, Any]) -> None:
    source = str(job.recipe.model)
    for step in job.steps:
        place = folder / step
        if not place.is_dir():
            recipe = only(job.recipe, step, source, str(place))
            reports[step] = STEPS[step](recipe, job, _said(step, progress))
        source = str(place)


def _finish(
    job: Job, folder: Path, progress: Progress, reports: dict[str, Any], resumed: bool
) -> None:
    """Let the last step's folder speak of all, and measure it against the original."""
    from optim.runtime.measure.proof import prove
    from optim.runtime.storage.manifest import Cost
    from optim.runtime.storage.record import record

    last = folder / job.steps[-1]
    restate(last, [folder / step for step in job.steps], job)
    if not job.how.evaluate:
        return
    costs = [(r["seconds"], r["peak_memory_bytes"]) for r in reports.values()]
    if not resumed:
        seconds, peaks = zip(*costs, strict=True)
        record(last, cost=Cost(seconds=sum(seconds), peak_memory_bytes=max(peaks)))
    try:
        prove(last, str(job.recipe.model), _said("measuring", progress), **_place(job))
    except OptimError as problem:
        reports["measuring"] = {"notes": [f"not measured: {problem.message}"]}


def _said(step: str, progress: Progress) -> Progress:
    return lambda at, total, text: progress(at, total, f"{step} · {text}")


def _place(job: Job) -> dict[str, Any]:
    """Where and how to work, as plans and measurements take it."""
    given: dict[str, Any] = {**job.how.given}
    return {key: value for key, value in given.items() if key != "force"}


def _quantize(recipe: Recipe, job: Job, progress: Progress) -> dict[str, Any]:
    from optim.quant.run import plan, quantize

    return quantize(plan(recipe, **_place(job)), progress).as_dict()


def _prune(recipe: Recipe, job: Job, progress: Progress) -> dict[str, Any]:
    from optim.prune.run import plan, prune

    return prune(plan(recipe, **_place(job)), progress).as_dict()


def _pack(recipe: Recipe, job: Job, progress: Progress) -> dict[str, Any]:
    from optim.export.lossless.pack import pack
    from optim.export.lossless.plan import plan

    assert recipe.model is not None and recipe.pack is not None
    trust = job.how.trust_remote_code
    made = plan(recipe.model, recipe.pack, recipe.output, trust_remote_code=trust)
    return pack(made, progress).as_dict()


def _export(recipe: Recipe, job: Job, progress: Progress) -> dict[str, Any]:
    from optim.export.run import export, plan

    assert recipe.model is not None and recipe.export is not None
    trust, force = job.how.trust_remote_code, job.how.force
    made = plan(recipe.model, recipe.export, recipe.output, force=force, trust_remote_code=trust)
    return export(made, progress).as_dict()


STEPS: Mapping[str, Callable[[Recipe, Job, Progress], dict[str, Any]]] = {
    "quantize": _quantize,
    "prune": _prune,
    "pack": _pack,
}
