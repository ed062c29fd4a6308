"""The recipe: what to do, as strict, frozen data.

A recipe has one section a command and no code. Adding a method is a class here and its row in
`METHODS` and `Quantize`, or in `PRUNINGS` and `Prune`; adding a section is a class and a field of
`Recipe`.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from optim.recipes.patterns import Pattern

VERSION = 1

Bits = Literal[2, 3, 4, 8]
# "auto" is the largest of 128, 64, 32 and 16 that divides every input; -1 is one group per row.
GroupSize = Literal["auto", -1, 16, 32, 64, 128, 256]
# Files give lists; a frozen recipe holds tuples.
Patterns = Annotated[tuple[Pattern, ...], Field(strict=False)]


class Section(BaseModel):
    """What every part of a recipe is: frozen, with no key it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Calibration(Section):
    """The text that is run through the model: `builtin:NAME`, `self`, a path or a hub id."""

    dataset: str = Field(default="builtin:mixed", min_length=1)
    split: str | None = None
    text_column: str = "text"
    num_samples: int = Field(default=64, ge=1, le=1_000_000)
    seq_len: int = Field(default=512, ge=16, le=1_000_000)
    seed: int = Field(default=0, ge=0, lt=2**63)

    @property
    def summary(self) -> str:
        """For the screen."""
        return f"{self.dataset} · {self.num_samples} x {self.seq_len} tokens"


class Override(Section):
    """Another format for the linears that `targets` names; what it leaves out is the section's."""

    targets: Patterns = Field(min_length=1)
    bits: Bits | None = None
    group_size: GroupSize | None = None
    sym: bool | None = None

    @model_validator(mode="after")
    def _says_something(self) -> "Override":
        if self.bits is None and self.group_size is None and self.sym is None:
            raise ValueError("an override must give bits, group_size or sym")
        return self


class Rounding(Section):
    """What every weight-only method has: the grid, and which linears get it."""

    method: str
    bits: Bits = 4
    group_size: GroupSize = "auto"
    sym: bool = False
    targets: Patterns = Field(default=("Linear",), min_length=1)
    ignore: Patterns = ("lm_head",)
    lm_head_bits: Literal[8] | None = None
    overrides: Annotated[tuple[Override, ...], Field(strict=False)] = ()


class Rtn(Rounding):
    """Plain rounding to the nearest: the baseline."""

    method: Literal["rtn"]


class Gptq(Rounding):
    """Error feedback over the columns (Frantar et al. 2022)."""

    method: Literal["gptq"]
    damping: float = Field(default=0.1, gt=0, lt=1)


class Awq(Rounding):
    """Activation-aware scales and clipping (Lin et al. 2023), then GPTQ's error feedback."""

    method: Literal["awq"]
    n_grid: int = Field(default=20, ge=1, le=1000)
    duo: Literal["both", True, False] = "both"
    clip: bool = True
    compensate: bool = True
    damping: float = Field(default=0.1, gt=0, lt=1)


class MergeQuant(Rounding):
    """Static integers: 4-bit weights, activations whose steps are part of the model (Wang 2025).

    It quantizes every linear of a block, so the keys that choose among them have one value.
    """

    method: Literal["mergequant"]
    bits: Literal[4] = 4
    group_size: Literal[-1] = -1
    sym: Literal[True] = True
    act_bits: Literal[4, 8] = 4
    down_bits: Literal[4, 8] = 8
    rotate: bool = True
    prefix: bool = True
    damping: float = Field(default=0.01, gt=0, lt=1)

    @field_validator("lm_head_bits")
    @classmethod
    def _leaves_the_head(cls, value: int | None) -> int | None:
        if value is not None:
            raise ValueError("mergequant leaves the head as it is; method awq can store it too")
        return value

    @model_validator(mode="after")
    def _takes_all_linears(self) -> "MergeQuant":
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
    sparsity: float = Field(default=0.25, ge=0, lt=1)
    only: Literal["all", "ffn", "down", "gate"] = "all"
    allocation: Literal["greedy", "uniform"] = "greedy"


class CoreInfer(Section):
    """A fixed set of neurons a prompt, chosen at the end of prefill (Wang et al. 2024)."""

    method: Literal["coreinfer"]
    keep: float = Field(default=0.6, gt=0, le=1)
    score: Literal["energy", "griffin", "paper"] = "energy"
    prior: bool = True
    bias: bool = True
    budget: Literal["measured", "uniform"] = "measured"
    guide: Literal["auto", "stability", "similarity"] = "auto"
    clusters: int = Field(default=0, ge=0, le=1000)
    alpha: float = Field(default=0.4, gt=0, le=1)
    refresh: int = Field(default=0, ge=0, le=1_000_000)
    max_kl: float | None = Field(default=None, gt=0)


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
    train: Literal["ffn", "lora", "full"] = "ffn"
    rank: int = Field(default=32, ge=1, le=65536)
    steps: int = Field(default=170, ge=1, le=100_000_000)
    batch: int = Field(default=2, ge=1, le=1_000_000)
    micro_batch: int = Field(default=1, ge=1, le=1_000_000)
    lr: float = Field(default=1.5e-3, gt=0, le=1)
    warmup: float = Field(default=0.15, ge=0, le=1)
    substitution: float = Field(default=0.5, gt=0, le=1)
    l1: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(strict=False)] = (
        0.02,
        0.05,
        0.05,
    )
    threshold: float = Field(default=0.0, ge=0)
    kl: float = Field(default=1.0, ge=0)
    square_head: float = Field(default=1.0, ge=0)
    labels: float = Field(default=0.0, ge=0)
    refit: int = Field(default=0, ge=0)
    recompute: bool = False
    save_every: int = Field(default=25, ge=1)

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


class Pack(Section):
    """The same bits in fewer bytes: DFloat11's codes, or fixed-rate planes."""

    layout: Literal["df11", "bf12"] = "df11"
    cast: bool = False
    targets: Patterns = Field(default=("Linear",), min_length=1)


# The sections whose keys depend on their method.
SECTIONS: dict[str, Mapping[str, type[Section]]] = {"quantize": METHODS, "prune": PRUNINGS}


class Recipe(Section):
    """The whole recipe, checked: one of the sections, or `quantize` and `pack` together."""

    version: Literal[1]
    model: str | None = Field(default=None, min_length=1)
    output: str | None = Field(default=None, min_length=1)
    calibration: Calibration = Calibration()
    quantize: Quantize | None = None
    prune: Prune | None = None
    pack: Pack | None = None

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

    @field_validator("quantize", "prune", "pack", mode="before")
    @classmethod
    def _has_keys(cls, section: Any) -> Any:
        if section is None:
            raise ValueError("must be a mapping of keys to values (got nothing)")
        return section

    @model_validator(mode="after")
    def _has_sections_that_go_together(self) -> "Recipe":
        if self.quantize is None and self.prune is None and self.pack is None:
            raise ValueError("must have a section quantize, prune or pack")
        if self.prune is not None and self.quantize is not None:
            raise ValueError("prune cannot stand beside quantize: prune the folder it has written")
        if self.prune is not None and self.pack is not None:
            raise ValueError("prune cannot stand beside pack: packed rows cannot be skipped")
        return self


def keys_of(path: tuple[str | int, ...], method: str | None) -> list[str]:
    """The keys allowed under `path`; `method` is its section's, if it is a known one."""
    section: type[Section] = Recipe
    if path[:1] == ("calibration",):
        section = Calibration
    elif path[:1] == ("pack",):
        section = Pack
    elif path[:2] == ("quantize", "overrides"):
        section = Override
    elif path and path[0] in SECTIONS:
        shared = Rounding if path[0] == "quantize" else Section
        section = SECTIONS[str(path[0])].get(method or "", shared)
    return list(section.model_fields)


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, for editors."""
    return Recipe.model_json_schema()
