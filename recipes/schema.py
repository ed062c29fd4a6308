"""The recipe: what to do, as strict, frozen data.

A recipe has one section a command and no code. Adding a method is a class here and its row in
`METHODS` and `Quantize`, or in `PRUNINGS` and `Prune`; adding a section is a class and a field of
`Recipe`. Adding a key is a field here: its flag, its line of `--help` and its row in docs/recipe.md
are made from the field's name, type, description and default (keys.py).
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from optim.recipes import meetings
from optim.recipes.section import SET_ONLY as SET_ONLY
from optim.recipes.section import Patterns
from optim.recipes.section import Section as Section
from optim.recipes.section import Spelled as Spelled
from optim.recipes.tuning import Tune as Tune
from optim.recipes.writing import BlockType
from optim.recipes.writing import Export as Export
from optim.recipes.writing import Pack as Pack

VERSION = 1

Bits = Literal[2, 3, 4, 8]
# "auto" is the largest of 128, 64, 32 and 16 that divides every input; -1 is one group per row.
GroupSize = Literal["auto", -1, 16, 32, 64, 128, 256]


class Calibration(Section):
    """The text that is run through the model: `builtin:NAME`, `self`, a path or a hub id."""

    dataset: Annotated[str, Spelled(("--calibration",))] = Field(
        default="builtin:mixed",
        min_length=1,
        description="text to run through the model: builtin:NAME, self, a file or folder, a hub id",
    )
    split: str | None = Field(default=None, description="split of a data set, where it has several")
    text_column: str = Field(default="text", description="column of a data set that holds the text")
    num_samples: int = Field(default=64, ge=1, le=1_000_000, description="windows of text")
    seq_len: int = Field(default=512, ge=16, le=1_000_000, description="tokens of a window")
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed that chooses the windows")

    @property
    def summary(self) -> str:
        """For the screen."""
        return f"{self.dataset} · {self.num_samples} x {self.seq_len} tokens"

    @property
    def places(self) -> tuple[Path, ...]:
        """The file or folder of the text, if that is what `dataset` is."""
        return (Path(self.dataset),) if os.path.exists(self.dataset) else ()


class Override(Section):
    """Another format for the linears that `targets` names; what it leaves out is the section's."""

    targets: Patterns = Field(min_length=1)
    bits: Bits | None = None
    group_size: GroupSize | None = None
    sym: bool | None = None
    grid: BlockType | None = None

    @model_validator(mode="after")
    def _says_something(self) -> "Override":
        if self.model_fields_set <= {"targets"}:
            raise ValueError("an override must give bits, group_size or sym, or else a grid")
        return self


DAMPING = "error feedback adds this share of the mean diagonal"


class Rounding(Section):
    """What every weight-only method has: the grid, and which linears get it."""

    method: str
    bits: Annotated[Bits, Spelled(("-b", "--bits"))] = Field(
        default=4, description="bits of a weight"
    )
    group_size: Annotated[GroupSize, Spelled(("-g", "--group-size"))] = Field(
        default="auto", description="inputs that share a scale; -1 is a whole row"
    )
    sym: Annotated[bool, Spelled(("--sym/--asym",))] = Field(
        default=False, description="without or with zero points"
    )
    grid: BlockType | None = Field(
        default=None,
        description="solve in the grid of GGUF's blocks, and store these: q4_0, iq4_nl, q4_k ...",
    )
    targets: Annotated[Patterns, SET_ONLY] = Field(
        default=("Linear",), min_length=1, description="linears to quantize: names or re:PATTERN"
    )
    ignore: Patterns = Field(
        default=("lm_head",), description="linears that stay as they are: names or re:PATTERN"
    )
    lm_head_bits: Literal[8] | None = Field(
        default=None, description="bits of the head, which stays as it is otherwise"
    )
    overrides: Annotated[tuple[Override, ...], Field(strict=False), SET_ONLY] = Field(
        default=(), description="bits, group_size, sym or grid of the linears that targets name"
    )

    @model_validator(mode="after")
    def _has_one_kind_of_grid(self) -> "Rounding":
        if self.grid is None:
            if any(override.grid for override in self.overrides):
                raise ValueError("an override can have a grid of GGUF where the section has one")
            return self
        fields = type(self).model_fields
        given = [k for k in ("bits", "group_size", "sym") if getattr(self, k) != fields[k].default]
        if given or not all(override.grid for override in self.overrides):
            said = ", ".join(given) or "the overrides"
            raise ValueError(f"grid {self.grid} has its own: {said} cannot be given beside it")
        return self


class Rtn(Rounding):
    """Plain rounding to the nearest: the baseline."""

    method: Literal["rtn"]


class Guided(Rounding):
    """What the methods have that fit a linear to the text it reads: which tokens count most."""

    guide: Literal["none", "loss"] = Field(
        default="none", description="weigh tokens by what the end loss feels of each: loss, or none"
    )
    guide_groups: Annotated[int, SET_ONLY] = Field(
        default=1, ge=1, le=64, description="parts of a linear's rows that guide loss tells apart"
    )
    sweeps: int = Field(
        default=0, ge=0, le=64, description="times that integers and scales are moved once rounded"
    )

    @model_validator(mode="after")
    def _moves_what_it_can(self) -> "Guided":
        if self.grid is not None and self.sweeps:
            raise ValueError(f"sweeps move scales freely, those of grid {self.grid} are not free")
        return self

    @property
    def guides(self) -> bool:
        """Whether tokens are weighed."""
        return self.guide == "loss"


class Gptq(Guided):
    """Error feedback over the columns (Frantar et al. 2022)."""

    method: Literal["gptq"]
    damping: float = Field(default=0.1, gt=0, lt=1, description=DAMPING)


class Awq(Guided):
    """Activation-aware scales and clipping (Lin et al. 2023), then GPTQ's error feedback."""

    method: Literal["awq"]
    n_grid: int = Field(default=20, ge=1, le=1000, description="scales tried for each group")
    duo: Literal["both", True, False] = Field(
        default="both",
        description="scales that look at the weights too: true, false, or both are tried",
    )
    clip: bool = Field(default=True, description="search for the best range of each group")
    compensate: bool = Field(default=True, description="round with GPTQ's error feedback")
    damping: float = Field(default=0.1, gt=0, lt=1, description=DAMPING)


class MergeQuant(Rounding):
    """Static integers: 4-bit weights, activations whose steps are part of the model (Wang 2025).

    It quantizes every linear of a block, so the keys that choose among them have one value.
    """

    method: Literal["mergequant"]
    bits: Literal[4] = 4
    group_size: Literal[-1] = -1
    sym: Literal[True] = True
    act_bits: Literal[4, 8] = Field(default=4, description="bits of the activations")
    down_bits: Literal[4, 8] = Field(default=8, description="bits of what down_proj reads")
    rotate: bool = Field(
        default=True, description="turn the hidden states, so that no channel is far louder"
    )
    prefix: bool = Field(default=True, description="begin every text with the outlier tokens")
    damping: float = Field(default=0.01, gt=0, lt=1, description=DAMPING)

    @field_validator("lm_head_bits")
    @classmethod
    def _leaves_the_head(cls, value: int | None) -> int | None:
        if value is not None:
            raise ValueError("mergequant leaves the head as it is; method awq can store it too")
        return value

    @model_validator(mode="after")
    def _takes_all_linears(self) -> "MergeQuant":
        if self.grid is not None:
            raise ValueError("mergequant has a grid of its own; method awq solves in those of GGUF")
        if self.targets != ("Linear",) or self.ignore != ("lm_head",) or self.overrides:
            raise ValueError("mergequant quantizes all linears of a block, and the head never")
        return self


METHODS: dict[str, type[Rounding]] = {
    "awq": Awq,
    "rtn": Rtn,
    "gptq": Gptq,
    "mergequant": MergeQuant,
}
Quantize = Annotated[Awq | Rtn | Gptq | MergeQuant, Field(discriminator="method")]


class Threshold(Section):
    """Skip the inputs of linears that are small (Liu et al. 2024, TEAL), token by token."""

    method: Literal["threshold"]
    sparsity: float = Field(default=0.25, ge=0, lt=1, description="share of the inputs skipped")
    only: Literal["all", "ffn", "down", "gate"] = Field(
        default="all", description="which linears: all, ffn, down (nearly lossless) or gate (CATS)"
    )
    allocation: Literal["greedy", "uniform"] = Field(
        default="greedy", description="how a block's budget is shared out"
    )


class CoreInfer(Section):
    """A fixed set of neurons a prompt, chosen at the end of prefill (Wang et al. 2024)."""

    method: Literal["coreinfer"]
    keep: float = Field(default=0.6, gt=0, le=1, description="share of the neurons kept")
    score: Literal["energy", "griffin", "paper"] = Field(
        default="energy", description="what makes a neuron count"
    )
    prior: bool = Field(default=True, description="calibration has a say in the choice")
    bias: Annotated[bool, SET_ONLY] = Field(
        default=True, description="neurons left out give their mean"
    )
    budget: Literal["measured", "uniform"] = Field(
        default="measured", description="how many neurons each block keeps"
    )
    guide: Literal["auto", "stability", "similarity"] = Field(
        default="auto", description="what chooses: the prompt and calibration, or calibration alone"
    )
    clusters: int = Field(default=0, ge=0, le=1000, description="kinds of calibration text")
    alpha: Annotated[float, SET_ONLY] = Field(
        default=0.4, gt=0, le=1, description="share of a prompt's tokens that a score counts"
    )
    refresh: int = Field(
        default=0, ge=0, le=1_000_000, description="choose again every so many tokens; 0: never"
    )
    max_kl: float | None = Field(
        default=None, gt=0, description="a prompt whose logits diverge more than this runs dense"
    )


class ReluExact(Section):
    """Skip exact zeros of a ReLU model: no loss at all."""

    method: Literal["relu-exact"]


TRAINING = {"num_samples": 600, "seq_len": 256}  # prosparse's text: nearly all of builtin:mixed


class ProSparse(Section):
    """ReLU, progressive L1 and shifted thresholds, by training (Song et al. 2024).

    `substitution` is the share of the steps in which the activation is swapped and settles; the
    rest is divided evenly among the stages, whose peaks of lambda are `l1`. In the first `warmup`
    of the steps the learning rate rises. Afterwards `refit` windows refit each down_proj.
    """

    method: Literal["prosparse"]
    train: Annotated[Literal["ffn", "lora", "full"], SET_ONLY] = Field(
        default="ffn", description="which weights move"
    )
    rank: Annotated[int, SET_ONLY] = Field(
        default=32, ge=1, le=65536, description="rank of the updates of train lora"
    )
    steps: int = Field(default=170, ge=1, le=100_000_000, description="steps of training")
    batch: Annotated[int, SET_ONLY] = Field(
        default=2, ge=1, le=1_000_000, description="windows of a step"
    )
    micro_batch: Annotated[int, SET_ONLY] = Field(
        default=1, ge=1, le=1_000_000, description="windows in memory at a time"
    )
    lr: Annotated[float, SET_ONLY] = Field(
        default=1.5e-3, gt=0, le=1, description="highest learning rate"
    )
    warmup: Annotated[float, SET_ONLY] = Field(
        default=0.15, ge=0, le=1, description="share of the steps in which the rate rises"
    )
    substitution: Annotated[float, SET_ONLY] = Field(
        default=0.5, gt=0, le=1, description="share of the steps that swap the activation"
    )
    l1: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(strict=False), SET_ONLY] = Field(
        default=(0.02, 0.05, 0.05), description="peaks of lambda, one a stage"
    )
    threshold: Annotated[float, SET_ONLY] = Field(
        default=0.0, ge=0, description="what ReLU's threshold is raised to at the end"
    )
    kl: Annotated[float, SET_ONLY] = Field(
        default=1.0, ge=0, description="weight of the divergence from the teacher's logits"
    )
    square_head: Annotated[float, SET_ONLY] = Field(
        default=1.0, ge=0, description="weight of the error of each block's output"
    )
    labels: Annotated[float, SET_ONLY] = Field(
        default=0.0, ge=0, description="weight of the loss on the text itself"
    )
    refit: Annotated[int, SET_ONLY] = Field(
        default=0, ge=0, description="windows on which each down_proj is refitted afterwards"
    )
    recompute: Annotated[bool, SET_ONLY] = Field(
        default=False, description="compute activations twice, to hold fewer in memory"
    )
    save_every: Annotated[int, SET_ONLY] = Field(
        default=25, ge=1, description="steps between two saved states"
    )

    @model_validator(mode="after")
    def _can_be_trained(self) -> "ProSparse":
        if self.kl == self.square_head == self.labels == 0:
            raise ValueError("one of kl, square_head and labels must be above 0")
        if any(a > b for a, b in zip(self.l1, self.l1[1:], strict=False)):
            raise ValueError("the peaks l1 must not fall")
        if self.batch % self.micro_batch:
            raise ValueError("batch must be a multiple of micro_batch")
        return self


PRUNINGS: dict[str, type[Section]] = {
    "threshold": Threshold,
    "coreinfer": CoreInfer,
    "relu-exact": ReluExact,
    "prosparse": ProSparse,
}
Prune = Annotated[Threshold | CoreInfer | ReluExact | ProSparse, Field(discriminator="method")]


# The sections whose keys depend on their method.
SECTIONS: dict[str, Mapping[str, type[Section]]] = {"quantize": METHODS, "prune": PRUNINGS}


class Recipe(Section):
    """The whole recipe, checked: one or more of the sections (meetings.py has who may meet)."""

    version: Literal[1]
    model: str | None = Field(default=None, min_length=1)
    output: str | None = Field(default=None, min_length=1)
    calibration: Calibration = Calibration()
    quantize: Quantize | None = None
    tune: Tune | None = None
    prune: Prune | None = None
    pack: Pack | None = None
    export: Export | None = None

    @model_validator(mode="before")
    @classmethod
    def _has_the_text_of_its_method(cls, data: Any) -> Any:
        """Training takes more text than calibration, where the recipe does not say how much."""
        prune = data.get("prune") if isinstance(data, dict) else None
        given = data.get("calibration", {}) if isinstance(data, dict) else None
        trains = isinstance(prune, dict) and prune.get("method") == "prosparse"
        if not trains or not isinstance(given, dict):
            return data
        return data | {"calibration": TRAINING | given}

    @field_validator("quantize", "tune", "prune", "pack", "export", mode="before")
    @classmethod
    def _has_keys(cls, section: Any) -> Any:
        if section is None:
            raise ValueError("must be a mapping of keys to values (got nothing)")
        return section

    @model_validator(mode="after")
    def _has_sections_that_go_together(self) -> "Recipe":
        if not meetings.sections(self):
            raise ValueError("must have a section quantize, prune, pack or export")
        if (why := meetings.refusal(self)) is not None:
            raise ValueError(why)
        return self


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, for editors."""
    return Recipe.model_json_schema()
