"""An Ollama Modelfile for a GGUF file: where it is, its chat as a Go template, what ends a turn.

Ollama does not run the Jinja template inside the file, so a chat without this rambles.
"""

from pathlib import Path

from optim.runtime.storage.checkpoint import Checkpoint

CHATML = """{{ if .System }}<|im_start|>system
{{ .System }}<|im_end|>
{{ end }}<|im_start|>user
{{ .Prompt }}<|im_end|>
<|im_start|>assistant
"""
LLAMA3 = """{{ if .System }}<|start_header_id|>system<|end_header_id|>

{{ .System }}<|eot_id|>{{ end }}<|start_header_id|>user<|end_header_id|>

{{ .Prompt }}<|eot_id|><|start_header_id|>assistant<|end_header_id|>

"""
GEMMA = """<start_of_turn>user
{{ if .System }}{{ .System }}

{{ end }}{{ .Prompt }}<end_of_turn>
<start_of_turn>model
"""
PHI = """{{ if .System }}<|system|>
{{ .System }}<|end|>
{{ end }}<|user|>
{{ .Prompt }}<|end|>
<|assistant|>
"""
MISTRAL = """[INST] {{ if .System }}{{ .System }}

{{ end }}{{ .Prompt }} [/INST]"""
GRANITE = """{{ if .System }}<|start_of_role|>system<|end_of_role|>{{ .System }}<|end_of_text|>
{{ end }}<|start_of_role|>user<|end_of_role|>{{ .Prompt }}<|end_of_text|>
<|start_of_role|>assistant<|end_of_role|>"""
# What the Jinja template writes, and the same chat in Go.
TEMPLATES = {
    "<|im_start|>": CHATML,
    "<|start_header_id|>": LLAMA3,
    "<start_of_turn>": GEMMA,
    "<|start_of_role|>": GRANITE,
    "<|end|>": PHI,
    "[INST]": MISTRAL,
}


def place_of(file: Path) -> Path:
    """Where the Modelfile of a GGUF file goes: beside it."""
    return file.with_suffix(".Modelfile")


def modelfile(checkpoint: Checkpoint, file: Path) -> str:
    """The text; a comment where the chat has no Go form here."""
    tokenizer = checkpoint.tokenizer()
    lines = [f"# ollama create NAME -f {place_of(file).name}", f"FROM ./{file.name}"]
    jinja = tokenizer.template or ""
    go = next((go for mark, go in TEMPLATES.items() if mark in jinja), None)
    if go is not None:
        lines.append(f'TEMPLATE """{go}"""')
    elif jinja:
        lines.append(
            "# The chat template of this model has no Go form here: add TEMPLATE yourself."
        )
    for end in sorted(tokenizer.eos_ids):
        text = tokenizer.decode([end], skip_special=False)
        if text:
            lines.append(f'PARAMETER stop "{text}"')
    return "\n".join(lines) + "\n"
