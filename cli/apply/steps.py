"""Carry out a recipe of several sections: each step on what the one before it has written.

The steps' folders lie in the workspace of the output, and what the last one has made becomes the
artifact: its small files then speak of all steps (restate.py), it is measured, and takes its name.
"""

import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optim.cli.apply.plan import Job, only
from optim.cli.apply.restate import restate
from optim.recipes.schema import Recipe

if TYPE_CHECKING:
    from optim.runtime.storage.workspace import Prove

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
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """A plain dictionary."""
        return asdict(self)


def carry_out(job: Job, progress: Progress, /, *, prove: "Prove | None") -> Report:
    """Do what is not done yet; `prove` measures the artifact, and its export.

    Raises OptimError as the steps do.
    """
    from optim.runtime.storage.manifest import Cost, Manifest, read_manifest

    start, reports, resumed = time.monotonic(), dict[str, Any](), True
    if job.how.force or not job.is_there:
        resumed = _make(job, progress, prove, reports)
    if job.exported is not None:
        made = only(job.recipe, "export", str(job.output), str(job.exported))
        reports["export"] = _export(made, job, _said("export", progress), prove)
    manifest, cost = read_manifest(job.output) or Manifest(), Cost.since(start)
    return Report(
        output=str(job.output),
        exported=None if job.exported is None else str(job.exported),
        output_bytes=manifest.bytes,
        seconds=cost.seconds,
        peak_memory_bytes=cost.peak_memory_bytes,
        resumed=resumed,
        steps=reports,
        notes=list(dict.fromkeys(n for report in reports.values() for n in report["notes"])),
    )


def _make(job: Job, progress: Progress, prove: "Prove | None", reports: dict[str, Any]) -> bool:
    """Make the artifact; whether a step of it was there already."""
    from optim.runtime.storage.manifest import Cost
    from optim.runtime.storage.workspace import KEPT, Workspace, identity
    from optim.runtime.system.hashes import text_sha256

    start = time.monotonic()
    what = identity(job.original, job.stated, _text(job))
    with Workspace(job.output, what, job.how.force, job.original) as workspace:
        folder = workspace.folder / KEPT / text_sha256(repr(what))[:12]
        folder.mkdir(parents=True, exist_ok=True)
        workspace.resumed = any(folder.iterdir())
        _run_steps(job, folder, progress, reports)
        for path in (folder / job.steps[-1]).iterdir():
            _link(path, workspace.files / path.name)
        restate(workspace.files, [folder / step for step in job.steps], job)
        workspace.publish(_then_keep(prove, folder, job), Cost.since(start))
    return workspace.resumed


def _then_keep(prove: "Prove | None", folder: Path, job: Job) -> "Prove | None":
    """`prove`, and then the steps' folders are put beside the output, if that is asked for."""

    def keep() -> None:
        if job.keep:
            shutil.rmtree(folder / job.steps[-1])
            os.replace(folder, job.kept)

    if prove is None:
        keep()
        return None

    def measure(files: Path) -> dict[str, Any] | None:
        found = prove(files)
        keep()
        return found

    return measure


def _link(path: Path, place: Path) -> None:
    """The same file under another name; a copy where the disk has no such links."""
    try:
        os.link(path, place)
    except OSError:
        shutil.copyfile(path, place)


def _text(job: Job) -> str | None:
    """The hash of the calibration tokens, so that another text is another run."""
    from optim.runtime.system.hashes import tokens_sha256
    from optim.runtime.text.windows import windows_for

    calibration = job.recipe.calibration
    if calibration.dataset == "self" or not {"quantize", "tune", "prune"} & {*job.steps}:
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


def _said(step: str, progress: Progress) -> Progress:
    return lambda at, total, text: progress(at, total, f"{step} · {text}")


def _place(job: Job) -> dict[str, Any]:
    """Where and how to work, as plans and measurements take it."""
    given: dict[str, Any] = {**job.how.given}
    return {key: value for key, value in given.items() if key != "force"}


def _quantize(recipe: Recipe, job: Job, progress: Progress) -> dict[str, Any]:
    from optim.quant.run import plan, quantize

    return quantize(plan(recipe, **_place(job)), progress).as_dict()


def _tune(recipe: Recipe, job: Job, progress: Progress) -> dict[str, Any]:
    from optim.quant.tune.run import tune
    from optim.quant.tune.train import Asked

    assert recipe.tune is not None and recipe.model and recipe.output and job.recipe.model
    asked = Asked(recipe.tune.epochs, recipe.tune.lr, seed=recipe.calibration.seed)
    return tune(
        recipe.model,
        job.recipe.model,
        recipe.output,
        recipe.calibration,
        asked,
        progress,
        device=job.how.device,
        threads=job.how.threads,
    ).as_dict()


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


def _export(recipe: Recipe, job: Job, progress: Progress, prove: "Prove | None") -> dict[str, Any]:
    from optim.export.run import export, plan

    assert recipe.model is not None and recipe.export is not None
    trust, force = job.how.trust_remote_code, job.how.force
    made = plan(recipe.model, recipe.export, recipe.output, force=force, trust_remote_code=trust)
    return export(made, progress, prove).as_dict()


STEPS: Mapping[str, Callable[[Recipe, Job, Progress], dict[str, Any]]] = {
    "quantize": _quantize,
    "tune": _tune,
    "prune": _prune,
    "pack": _pack,
}
