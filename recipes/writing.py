"""The sections that write a model otherwise, with weights that are there: `pack` and `export`."""

from typing import Annotated, Literal

from pydantic import Field

from optim.recipes.section import Patterns, Section, Spelled

# Types of GGUF's blocks: bits, groups and scales are theirs.
BlockType = Literal[
    "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"
]
FileType = Literal["f32", "f16", "bf16", BlockType]


class Pack(Section):
    """The same bits in fewer bytes: DFloat11's codes, or fixed-rate planes."""

    layout: Literal["df11", "bf12"] = Field(
        default="df11", description="df11 is the smallest; bf12 is made to be run"
    )
    cast: Annotated[bool, Spelled(("--cast",))] = Field(
        default=False, description="round fp16 and fp32 weights to bf16 first: not lossless"
    )
    targets: Annotated[Patterns, Spelled(("--target",))] = Field(
        default=("Linear",), min_length=1, description="modules to pack: names or re:PATTERN"
    )


class Export(Section):
    """The model in the form of another program."""

    format: Annotated[
        Literal["gguf", "safetensors", "awq", "gptq", "mlx", "compressed-tensors"],
        Spelled(("-f", "--format")),
    ] = Field(default="gguf", description="what is written")
    type: FileType | None = Field(
        default=None, description="type of the weights that do not stay integers"
    )
    pre: str | None = Field(
        default=None, description="gguf: name of the rule that cuts text, where it is not found"
    )
    modelfile: Annotated[bool, Spelled(("--modelfile",))] = Field(
        default=False, description="gguf: write an Ollama Modelfile beside the file"
    )
