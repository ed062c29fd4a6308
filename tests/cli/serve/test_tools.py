"""Tools that have to be called: the answer is a call that the tool's schema allows."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.serve.conftest import Server, serving
from tests.conftest import MakeModel

openai = pytest.importorskip("openai")
pytest.importorskip("llguidance")
TEMPLATE = "{% for m in messages %}{{ m.content }}|{% endfor %}"
DIGIT = {"enum": [1, 2, 3]}
PARAMETERS = {
    "type": "object",
    "properties": {"n": {"$ref": "#/$defs/digit"}},
    "required": ["n"],
    "additionalProperties": False,
    "$defs": {"digit": DIGIT},
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "first", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "second.one"}},
]
SECOND = {"type": "function", "function": {"name": "second.one"}}


@pytest.fixture(scope="module")
def server(make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A random model, whose tokens are bytes; it knows nothing of tools."""
    folder = tmp_path_factory.mktemp("tools") / "model"
    shutil.copytree(make_model("llama", max_position_embeddings=512), folder)
    path = Path(folder / "tokenizer_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))
    with serving(str(folder)) as server:
        yield server


def ask(server: Server, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Hello"}]
    return {"model": server.name, "messages": messages, "tools": TOOLS, "temperature": 1, **more}


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_is_certain(server: Server, stream: bool) -> None:
    names = set()
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        create = client.chat.completions.create
        for seed, choice in enumerate(["required"] * 6 + [SECOND] * 2):
            told = create(**ask(server, tool_choice=choice, seed=seed, stream=stream))
            chunks = [chunk.choices[0] for chunk in told] if stream else [told.choices[0]]
            assert chunks[-1].finish_reason == "tool_calls"
            parts = [chunk.delta if stream else chunk.message for chunk in chunks]
            assert not any(part.content for part in parts)
            ((call,),) = [part.tool_calls for part in parts if part.tool_calls]
            arguments = json.loads(call.function.arguments)
            if call.function.name == "first":
                assert arguments.keys() == {"n"} and arguments["n"] in DIGIT["enum"]
            else:
                assert (call.function.name, arguments) == ("second.one", {})
            assert choice == "required" or call.function.name == "second.one"
            names.add(call.function.name)
    assert names == {"first", "second.one"}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"tool_choice": "always"}, "tool_choice is"),
    ({"tool_choice": "required", "tools": []}, "tool_choice demands a tool"),
    ({"tool_choice": {"type": "function", "function": {"name": "third"}}}, "demands third"),
    ({"tool_choice": {"type": "function"}}, "tool_choice.function"),
    ({"tool_choice": "required", "tools": [{"type": "web_search"}]}, "tools.type"),
    ({"tool_choice": "required", "tools": [{**SECOND, "function": {"name": "a b"}}]}, "tools"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "no"}}}},
        "sch",
    ),
]


@pytest.mark.parametrize(("change", "words"), BAD, ids=lambda x: str(x)[:30])
def test_what_cannot_be_demanded(server: Server, change: dict[str, Any], words: str) -> None:
    code, said, _ = server.ask("/v1/chat/completions", ask(server, **change))
    assert code == 400 and words in said["error"]["message"], said
