"""mergequant's row of the table of methods: from a recipe to the solver, its prefix, its config."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optim.quant.mergequant.prefix import find_prefix
from optim.quant.mergequant.rotation import refuse_family
from optim.quant.mergequant.sites import KEPT_BYTES, SAMPLE_TOKENS
from optim.quant.mergequant.solver import Form, MergeSolver
from optim.quant.mergequant.stored import static_tensors
from optim.quant.solver import Method, Shapes, Solved, Task
from optim.recipes.schema import MergeQuant, Recipe, Rounding
from optim.runtime.formats.pack_quantized import Scheme
from optim.runtime.formats.static_int import Static, stream_rotation
from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.walk.walk import HiddenStates

PREFIX = "prefix.json"
FEW_DAMPING = 0.1  # the least where there are fewer tokens than channels


class StaticIntegers:
    """The solver of a recipe, with a prefix that is found once and kept in the task's folder.

    A mixture has none: its positions are lost among the experts.
    """

    def __init__(self, task: Task) -> None:
        self.task, self.section = task, _section(task.recipe)
        assert task.windows is not None
        self.windows, self.prefix = _with_prefix(task, self.section)
        widest = max(
            info.shape[-1] for name, info in task.checkpoint.tensors.items() if ".layers." in name
        )
        enough = self.windows.numel() >= widest
        damping = self.section.damping
        form = Form(
            bits=self.section.act_bits,
            down_bits=self.section.down_bits,
            rotate=self.section.rotate,
            damping=damping if enough else max(damping, FEW_DAMPING),
            out=_end(self.section),
            down=_end(self.section),
        )
        width = int(task.checkpoint.text_config["hidden_size"])
        rotation = stream_rotation(width) if self.section.rotate else None
        self.solver = MergeSolver(task.walk, form, rotation, len(self.prefix))

    def enter(self, states: HiddenStates) -> None:
        """Turn the stream."""
        self.solver.begin(states)

    def solve(self, i: int, states: HiddenStates | None) -> Solved:
        """Quantize block i; OptimError (2) for weights or inputs that are not finite."""
        assert states is not None
        return self.solver.solve(i, states)

    def tensors(self, block: nn.Module, prefix: str) -> dict[str, Tensor]:
        """Packed linears, the steps of their inputs, the rest in float32."""
        return static_tensors(block, prefix, self.task.checkpoint)

    def config(self, schemes: Mapping[str, Scheme], ignored: Iterable[str]) -> dict[str, Any]:
        """Bits and kinds of each site: all linears of a block are quantized, and no others."""
        section = self.section
        end = "token" if _end(section) == "token" else "static"
        kinds = {"norm": "static", "out": end, "down": end}
        if _is_mixture(schemes):
            kinds["down"] = "token"
        bits = {"norm": section.act_bits, "out": section.act_bits, "down": section.down_bits}
        return Static(bits, kinds, section.rotate, tuple(self.prefix)).config()


def _section(recipe: Recipe) -> MergeQuant:
    assert isinstance(recipe.quantize, MergeQuant)
    return recipe.quantize


def _is_mixture(names: Iterable[str]) -> bool:
    return any(".experts." in name for name in names)


def _end(section: MergeQuant) -> str:
    """How o_proj and down_proj are read: without a prefix, each token has to give its step."""
    return "channel" if section.prefix or section.act_bits == 8 else "token"


def _with_prefix(task: Task, section: MergeQuant) -> tuple[Tensor, list[int]]:
    """The windows with the prefix before each, in the place of the BOS they begin with; it."""
    windows, checkpoint = task.windows, task.checkpoint
    assert windows is not None
    if not section.prefix or _is_mixture(checkpoint.tensors):
        return windows, []
    begin = list(checkpoint.tokenizer().begin)
    begun = bool(begin) and bool(windows[:, : len(begin)].eq(torch.tensor(begin)).all())
    text = windows[:, len(begin) :] if begun else windows
    prefix = _found(checkpoint, text, task.folder, begin if begun else [])
    first = torch.tensor(prefix, dtype=torch.int64).expand(len(text), -1)
    return torch.cat((first, text), 1), prefix


def _found(checkpoint: Checkpoint, windows: Tensor, folder: Path, begin: list[int]) -> list[int]:
    path = folder / PREFIX
    if not path.is_file():
        found = find_prefix(checkpoint, windows, folder / "prefix-states", begin)
        path.write_text(json.dumps(found))
    tokens: list[int] = json.loads(path.read_text())
    return tokens


def _check(section: Rounding, checkpoint: Checkpoint) -> None:
    assert isinstance(section, MergeQuant)
    refuse_family(checkpoint.family, section.rotate)


def _notes(recipe: Recipe, shapes: Shapes, schemes: Mapping[str, Scheme]) -> Iterator[str]:
    tokens = recipe.calibration.num_samples * recipe.calibration.seq_len
    widest = max((shapes[name][1] for name in schemes), default=0)
    if tokens < widest:
        yield (
            f"{tokens} calibration tokens are few for inputs of {widest} channels: "
            "damping is raised for them"
        )


def _form(section: Rounding) -> str:
    assert isinstance(section, MergeQuant)
    return f"w4a{section.act_bits}"


def _sample_bytes(tokens: int, widest: int) -> int:
    """A site's inputs, and the sample of them that steps are chosen on."""
    return min(KEPT_BYTES, 4 * tokens * widest) + 4 * SAMPLE_TOKENS * widest * 4


MERGEQUANT = Method(
    StaticIntegers,
    check=_check,
    notes=_notes,
    form=_form,
    sample_bytes=_sample_bytes,
    tags=("optim",),
    programs=("optim",),
    remark="The layout is optim's own (docs/artifact.md): no field format holds static steps.",
)
