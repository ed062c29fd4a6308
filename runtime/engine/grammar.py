"""Answers that follow a JSON schema, or call a tool: llguidance says which tokens may come next."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.text.tokenizer import Tokenizer

COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as chat templates write it; a small model could go on with blanks forever else."""


def of_call(functions: Mapping[str, dict[str, Any]]) -> str:
    """The grammar of one call of a function, as Hermes and Qwen write it.

    `functions`: the schemas of their arguments, by name.
    """
    calls = " | ".join(f"call_{i}" for i in range(len(functions)))
    lines = [f'start: "<tool_call>\\n" ({calls}) "}}\\n</tool_call>"']
    for i, (name, schema) in enumerate(functions.items()):
        begin = json.dumps(f'{{"name": {json.dumps(name)}, "arguments": ')
        lines.append(f"call_{i}: {begin} arguments_{i}")
        lines.append(f"arguments_{i}: %json {json.dumps({**schema, 'x-guidance': COMPACT})}")
    return "\n".join(lines)


class Guided:
    """The grammar of one answer: a JSON schema, or what `of_call` gives.

    OptimError (2) for a schema that cannot be followed.
    """

    def __init__(self, words: Any, grammar: dict[str, Any] | str) -> None:
        from llguidance import LLMatcher

        try:
            if isinstance(grammar, dict):
                grammar = LLMatcher.grammar_from_json_schema(grammar)
            else:
                grammar = LLMatcher.grammar_from_lark(grammar)
            self._matcher = LLMatcher(words, grammar)
        except ValueError as error:
            raise OptimError(f"the schema cannot be read: {error}", code=USAGE) from None
        if self._matcher.is_error():
            why = self._matcher.get_error().splitlines()[0]
            raise OptimError(f"the schema cannot be followed: {why}", code=USAGE)

    def mask(self, logits: Tensor) -> Tensor:
        """`logits` `[V]` with minus infinity where a token would break the grammar."""
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        known = torch.zeros(logits.numel(), dtype=torch.bool)
        count = min(logits.numel(), allowed.numel())
        known[:count] = allowed[:count] > 0
        return logits.masked_fill(~known.to(logits.device), float("-inf"))

    @property
    def done(self) -> bool:
        """Whether nothing more may be written."""
        return bool(self._matcher.is_stopped())

    def take(self, token: int) -> None:
        """`token` has been written."""
        self._matcher.consume_token(token)


def words_of(tokenizer: Tokenizer) -> Any:
    """The vocabulary as llguidance wants it: 0.7 s for 49k tokens, so made once.

    Raises OptimError (4) if llguidance is not installed.
    """
    try:
        from llguidance import LLTokenizer
    except ImportError:
        what = "JSON schemas, and tools that have to be called, need the package llguidance"
        raise OptimError(what, "pip install 'optim-llm[json]'", 4) from None
    try:
        return LLTokenizer(tokenizer.as_json(), eos_token=sorted(tokenizer.eos_ids) or None)
    except ValueError as error:
        what = f"llguidance does not know this tokenizer: {error}"
        raise OptimError(what, "ask without a schema", USAGE) from None
