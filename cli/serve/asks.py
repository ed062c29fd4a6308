"""From a request's body to the texts that answer it; everything is checked before it is queued."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from optim.cli.serve.errors import Refused
from optim.cli.serve.protocol import (
    Body,
    Chat,
    Completion,
    Responses,
    demanded,
    parse,
    schema_of,
)
from optim.recipes.errors import OptimError

if TYPE_CHECKING:
    from optim.runtime.engine.load import Model
    from optim.runtime.engine.sampling import Sampling
    from optim.runtime.engine.sequence import Request, Sequence
    from optim.runtime.engine.slots import Slots

DEEPEST = 64
LONGEST_SCHEMA = 64 << 10


@dataclass(frozen=True, slots=True)
class Ask:
    """A request that can be answered: its texts, one for each choice."""

    body: Body
    sequences: list[Sequence]


def read_json(data: bytes) -> Any:
    """The JSON of a body. Refused (400) if it is none, or nests deeper than anyone needs."""
    try:
        found = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError:
        raise Refused(400, "the body is not UTF-8", "invalid_body") from None
    except RecursionError:
        raise Refused(400, f"the body nests deeper than {DEEPEST}", "invalid_body") from None
    except ValueError as error:
        raise Refused(400, f"the body is not JSON: {error}", "invalid_body") from None
    level = [found]
    for _ in range(DEEPEST):
        level = [item for one in level for item in _inside(one)]
        if not level:
            return found
    raise Refused(400, f"the body nests deeper than {DEEPEST}", "invalid_body")


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


@dataclass(slots=True)
class Asker:
    """Makes requests' texts; called in threads, one at a time."""

    model: Model
    slots: Slots
    name: str
    defaults: Sampling
    speculate: str = "off"
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _words: Any = None

    def ask(self, kind: type[Body], data: bytes) -> Ask:
        """Refused (400, 404) if the body asks for something that cannot be."""
        body = parse(kind, read_json(data))
        if body.model not in (None, self.name):
            what = f"the model is called {self.name!r} here"
            raise Refused(404, what, "model_not_found", "model")
        try:
            with self._lock:
                return Ask(body, self._sequences(body))
        except OptimError as error:
            fix = f": {error.fix}" if error.fix else ""
            raise Refused(400, f"{error.message}{fix}", "invalid_value") from None

    def _sequences(self, body: Body) -> list[Sequence]:
        from optim.runtime.engine.drafts import lookup
        from optim.runtime.engine.sequence import Sequence

        prompts = self._prompts(body)
        count = len(self.slots.slots)
        if body.n * len(prompts) > count:
            what = f"{body.n * len(prompts)} answers in one request, {count} at most"
            raise Refused(400, what, "invalid_value", "n")
        made = []
        for ids in prompts:
            for number in range(body.n):
                request = self._request(body, ids, number)
                sequence = Sequence(self.model, request, self.slots.context, self._grammar(body))
                sequence.drafts = lookup(self.speculate)
                if not self.slots.ever_fits(sequence):
                    what = "this text could never fit the memory for keys and values"
                    raise Refused(400, f"{what}: give a smaller max_tokens", "context_too_large")
                made.append(sequence)
        return made

    def _request(self, body: Body, ids: list[int], number: int) -> Request:
        from optim.runtime.engine.sequence import Request

        given = body.sampling
        if "seed" in given:
            given["seed"] = (given["seed"] + number) % 2**63
        bias = tuple(sorted((body.logit_bias or {}).items()))
        if any(not 0 <= token < self.vocabulary for token, _ in bias):
            what = f"logit_bias names tokens from 0 to {self.vocabulary - 1}"
            raise Refused(400, what, "invalid_value", "logit_bias")
        if len(ids) > self.slots.context:
            what = f"the prompt is {len(ids)} tokens, the context {self.slots.context}: shorten it"
            raise Refused(400, what, "context_length_exceeded", "messages")
        return Request(ids, replace(self.defaults, **given), False, _chances(body), bias)

    @property
    def vocabulary(self) -> int:
        """Rows of the model's output."""
        return int(self.model.config.get("vocab_size", self.model.tokenizer.vocab_size))

    def _prompts(self, body: Body) -> list[list[int]]:
        if isinstance(body, Completion):
            return self._texts(body)
        assert isinstance(body, Chat | Responses)
        tools: dict[str, Any] = {}
        if isinstance(body, Chat) and body.tools and body.tool_choice != "none":
            tools = {"tools": body.tools}
        if not self.model.tokenizer.has_chat_template:
            what = "this model has no chat template: ask /v1/completions"
            raise Refused(400, what, "no_chat_template")
        turns: Any = [message.plain for message in body.messages]
        return [self.model.tokenizer.chat(turns, **tools)]

    def _texts(self, body: Completion) -> list[list[int]]:
        """The prompts of a completion as ids."""
        given: list[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
        if given and isinstance(given[0], int):
            given = [given]
        found = [
            item if isinstance(item, list) else self.model.tokenizer.encode(item, special=True)
            for item in given
        ]
        if any(not 0 <= token < self.vocabulary for ids in found for token in ids):
            what = f"a prompt's tokens are from 0 to {self.vocabulary - 1}"
            raise Refused(400, what, "invalid_value", "prompt")
        if not found or not all(found):
            raise Refused(400, "the prompt is empty", "invalid_value", "prompt")
        return found

    def _grammar(self, body: Body) -> Any:
        from optim.runtime.engine.grammar import Guided, of_call, words_of

        if not isinstance(body, Chat):
            return None
        functions = demanded(body)
        grammar = of_call(functions) if functions else schema_of(body)
        if grammar is None:
            return None
        if len(grammar if isinstance(grammar, str) else json.dumps(grammar)) > LONGEST_SCHEMA:
            what = f"the schema is longer than {LONGEST_SCHEMA} bytes"
            raise Refused(400, what, "invalid_value", "tools" if functions else "response_format")
        if self._words is None:
            self._words = words_of(self.model.tokenizer)
        return Guided(self._words, grammar)


def _chances(body: Body) -> int | None:
    """How many likeliest tokens are to be told; None: nothing of chances."""
    if isinstance(body, Chat):
        return body.top_logprobs if body.logprobs else None
    return body.logprobs if isinstance(body, Completion) else None
