"""What clients send: the fields of OpenAI's requests that are understood, and those refused."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from optim.cli.serve.errors import Refused

MOST_STOPS, MOST_TOP = 16, 20
UNREAD = ("audio", "functions", "function_call", "suffix", "prediction", "web_search_options")
"""Fields that would change the answer, and that this server does not have."""


class Part(BaseModel):
    """A piece of a message."""

    type: Literal["text", "input_text", "output_text"]
    text: str


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    @property
    def plain(self) -> dict[str, Any]:
        """As chat templates want it."""
        parts = self.content or ""
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        role = "system" if self.role == "developer" else self.role
        more = {"name": self.name, "tool_calls": self.tool_calls, "tool_call_id": self.tool_call_id}
        found = {key: value for key, value in more.items() if value is not None}
        return {"role": role, "content": text, **found}


class Function(BaseModel):
    """What a model may call; without `parameters` it takes none."""

    name: str = Field(pattern=r"^[\w.-]{1,64}$")
    parameters: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


class Tool(BaseModel):
    """One of the tools, or the one that is demanded."""

    type: Literal["function"]
    function: Function


class StreamOptions(BaseModel):
    """What a stream has beside its text."""

    include_usage: bool = False


class Body(BaseModel):
    """What all kinds of requests share. Fields that are not known are passed over."""

    model_config = ConfigDict(extra="ignore")
    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: list[str] | None = Field(None, max_length=MOST_STOPS)
    logit_bias: dict[int, float] | None = Field(None, max_length=1024)
    n: int = Field(1, ge=1, le=128)

    @field_validator("stop", mode="before")
    @classmethod
    def _list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("stop")
    @classmethod
    def _short(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and not all(0 < len(stop) <= 256 for stop in value):
            raise ValueError("a stop text has 1 to 256 characters")
        return value

    @model_validator(mode="before")
    @classmethod
    def _unread(cls, found: Any) -> Any:
        for key in UNREAD:
            if isinstance(found, dict) and found.get(key) not in (None, "", [], {}):
                raise ValueError(f"this server has no {key}")
        return found

    @property
    def sampling(self) -> dict[str, Any]:
        """The fields of `Sampling` that were given."""
        names: tuple[str, ...] = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        names += ("presence_penalty", "frequency_penalty", "seed", "max_tokens")
        given = {name: getattr(self, name) for name in names}
        found = {name: value for name, value in given.items() if value is not None}
        if self.stop:
            found["stop"] = tuple(self.stop)
        return found

    @property
    def usage_wanted(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class Chat(Body):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MOST_TOP)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_most(self) -> Chat:
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        return self


class Completion(Body):
    """POST /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None


class Responses(Body):
    """POST /v1/responses: text in, text out, nothing kept."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    previous_response_id: None = None
    background: Literal[False] | None = None

    @model_validator(mode="after")
    def _one_most(self) -> Responses:
        self.max_tokens = self.max_output_tokens or self.max_tokens
        return self

    @property
    def messages(self) -> list[Message]:
        """The conversation; items that are no messages are passed over."""
        items = self.input
        if isinstance(items, str):
            items = [{"role": "user", "content": items}]
        told = [{"role": "system", "content": self.instructions}] if self.instructions else []
        kept = [item for item in items if item.get("type", "message") == "message"]
        return [Message.model_validate(item) for item in [*told, *kept]]


B = TypeVar("B", bound=BaseModel)


def schema_of(chat: Chat) -> dict[str, Any] | None:
    """The JSON schema that the answer has to follow, if any. Refused (400) for another form."""
    asked = chat.response_format or {"type": "text"}
    if asked.get("type") == "text":
        return None
    if asked.get("type") == "json_object":
        return {"type": "object"}
    schema = asked.get("json_schema")
    if asked.get("type") != "json_schema" or not isinstance(schema, dict):
        what = "response_format is text, json_object, or json_schema with its schema"
        raise Refused(400, what, "invalid_value", "response_format")
    found = schema.get("schema")
    if not isinstance(found, dict):
        what = "response_format.json_schema.schema is missing"
        raise Refused(400, what, "invalid_value", "response_format")
    return found


def demanded(chat: Chat) -> dict[str, dict[str, Any]]:
    """The functions of which the answer has to call one: the schemas of their arguments, by name.

    {} if it need not call any. Refused (400) if none of them is there.
    """
    choice = chat.tool_choice
    if choice in (None, "auto", "none"):
        return {}
    tools = [parse(Tool, tool, "tools").function for tool in chat.tools or []]
    known = {tool.name: tool.parameters for tool in tools}
    if choice == "required":
        wanted = list(known)
    elif isinstance(choice, dict) and choice.get("type") == "function":
        wanted = [parse(Tool, choice, "tool_choice").function.name]
    else:
        what = "tool_choice is auto, none, required, or one function by its name"
        raise Refused(400, what, "invalid_value", "tool_choice")
    if not wanted or not known.keys() >= set(wanted):
        what = f"tool_choice demands {wanted[0] if wanted else 'a tool'}, which is not in tools"
        raise Refused(400, what, "invalid_value", "tool_choice")
    return {name: known[name] for name in wanted}


def parse(kind: type[B], data: object, field: str = "") -> B:
    """`data`, of `field`, as a `kind`. Refused (400), and told which part, if it is none."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in (*filter(None, [field]), *first["loc"]))[:100]
        words = f"{place}: {first['msg']}" if place else first["msg"]
        raise Refused(400, words, "invalid_value", place or None) from None
