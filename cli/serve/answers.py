"""What clients get: the JSON of whole answers, and of the pieces of a stream."""

from __future__ import annotations

import json
import re
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from optim.cli.serve.asks import Ask
from optim.cli.serve.protocol import Chat, Completion

if TYPE_CHECKING:
    from optim.runtime.engine.sequence import Event, Token
    from optim.runtime.text.tokenizer import Tokenizer

CALL = "<tool_call>"
CALLS = re.compile(r"<tool_call>\s*(\{.*?\})\s*(?:</tool_call>|$)", re.DOTALL)
FINISH = {"context": "length"}


@dataclass(slots=True)
class Choice:
    """One answer as it comes."""

    index: int
    pieces: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    reason: str = ""
    shown: int = 0
    """Characters of it that a stream has sent."""

    def add(self, event: Event) -> None:
        self.pieces.append(event.piece)
        if event.token is not None:
            self.tokens.append(event.token)
        self.reason = event.reason

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def finish(self) -> str:
        return FINISH.get(self.reason, self.reason)


@dataclass(slots=True)
class Form:
    """How the answers of one request are written: as a chat's, or a completion's."""

    ask: Ask
    model: str
    tokenizer: Tokenizer
    choices: list[Choice] = field(init=False)
    id: str = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.choices = [Choice(i) for i in range(len(self.ask.sequences))]
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex[:24]}"

    @property
    def chat(self) -> bool:
        return not isinstance(self.ask.body, Completion)

    @property
    def tools(self) -> bool:
        body = self.ask.body
        return isinstance(body, Chat) and bool(body.tools) and body.tool_choice != "none"

    def add(self, event: Event) -> Choice:
        """The choice that the event belongs to, with the event."""
        choice = self.choices[self.ask.sequences.index(event.sequence)]
        choice.add(event)
        return choice

    def whole(self) -> dict[str, Any]:
        """The answer at once."""
        make = self._chat_choice if self.chat else self._text_choice
        kind = "chat.completion" if self.chat else "text_completion"
        made = [make(choice) for choice in self.choices]
        return {**self._head(kind), "choices": made, "usage": self.usage()}

    def begin(self) -> list[dict[str, Any]]:
        """What comes before the first token."""
        if not self.chat:
            return []
        first = {"role": "assistant", "content": ""}
        return [self._chunk(choice, delta=first) for choice in self.choices]

    def piece(self, choice: Choice, event: Event) -> list[dict[str, Any]]:
        """What a stream says of one event."""
        said: list[dict[str, Any]] = []
        text = self._showable(choice)
        chances = self._chances([event.token] if event.token else [])
        if text or chances:
            delta = {"content": text} if self.chat else None
            said.append(self._chunk(choice, delta, text, chances))
        if not choice.reason:
            return said
        finish = choice.finish
        if self.tools and (calls := calls_in(choice.text)):
            finish = "tool_calls"
            numbered = [{"index": i, **call} for i, call in enumerate(calls)]
            said.append(self._chunk(choice, delta={"tool_calls": numbered}))
        said.append(self._chunk(choice, delta={} if self.chat else None, finish=finish))
        return said

    def last(self) -> list[dict[str, Any]]:
        """What comes after the last token: what was used, if it was asked for."""
        if not self.ask.body.usage_wanted:
            return []
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return [{**self._head(kind), "choices": [], "usage": self.usage()}]

    def usage(self) -> dict[str, Any]:
        sequences = self.ask.sequences
        # The choices of one prompt share it.
        prompt = sum(len(s.request.ids) for s in sequences[:: self.ask.body.n])
        cached = sum(s.cached for s in sequences[:: self.ask.body.n])
        new = sum(len(choice.tokens) for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chat_choice(self, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text}
        finish = choice.finish
        if self.tools and (calls := calls_in(choice.text)):
            finish = "tool_calls"
            before = choice.text.partition(CALL)[0].strip()
            message |= {"content": before or None, "tool_calls": calls}
        chances = self._chances(choice.tokens)
        return {
            "index": choice.index,
            "message": message,
            "logprobs": chances,
            "finish_reason": finish,
        }

    def _text_choice(self, choice: Choice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "text": choice.text,
            "logprobs": self._chances(choice.tokens),
            "finish_reason": choice.finish,
        }

    def _chunk(
        self,
        choice: Choice,
        delta: dict[str, Any] | None = None,
        text: str = "",
        chances: Any = None,
        finish: str | None = None,
    ) -> dict[str, Any]:
        body = {"delta": delta} if self.chat else {"text": text}
        told = {"index": choice.index, **body, "logprobs": chances, "finish_reason": finish}
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        usage = {"usage": None} if self.ask.body.usage_wanted else {}
        return {**self._head(kind), "choices": [told], **usage}

    def _showable(self, choice: Choice) -> str:
        """What a stream may show now: a call of a tool is held back from its mark on."""
        text = choice.text
        end = len(text)
        if self.tools:
            at = text.find(CALL, max(0, choice.shown - len(CALL)))
            cut = range(min(len(text), len(CALL) - 1), 0, -1)
            part = next((n for n in cut if CALL.startswith(text[-n:])), 0)
            end = at if at >= 0 else end - (0 if choice.reason else part)
            if at >= 0 and choice.reason and not calls_in(text):
                end = len(text)
        shown, choice.shown = choice.shown, max(choice.shown, end)
        return text[shown:end]

    def _chances(self, tokens: list[Token]) -> Any:
        if self.ask.sequences[0].request.logprobs is None or not tokens:
            return None
        if self.chat:
            return {"content": [self._chance(token) for token in tokens], "refusal": None}
        words = [self._word(token.id) for token in tokens]
        likeliest = [{self._word(i): c for i, c in token.likeliest} for token in tokens]
        starts, at = [], 0
        for word in words:
            starts.append(at)
            at += len(word)
        return {
            "tokens": words,
            "token_logprobs": [token.chance for token in tokens],
            "top_logprobs": likeliest,
            "text_offset": starts,
        }

    def _chance(self, token: Token) -> dict[str, Any]:
        top = [self._told(id, chance) for id, chance in token.likeliest]
        return {**self._told(token.id, token.chance), "top_logprobs": top}

    def _told(self, id: int, chance: float | None) -> dict[str, Any]:
        word = self._word(id)
        return {"token": word, "logprob": chance, "bytes": list(word.encode())}

    def _word(self, id: int) -> str:
        return self.tokenizer.decode([id], skip_special=False)


def calls_in(text: str) -> list[dict[str, Any]]:
    """The tools that an answer calls, as Hermes and Qwen write them; [] if there is none."""
    calls = []
    for found in CALLS.finditer(text):
        try:
            call = json.loads(found[1])
        except (ValueError, RecursionError):
            continue
        if isinstance(call, dict) and isinstance(call.get("name"), str):
            arguments = json.dumps(call.get("arguments", {}), ensure_ascii=False)
            function = {"name": call["name"], "arguments": arguments}
            calls.append(
                {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
            )
    return calls
