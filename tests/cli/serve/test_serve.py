"""The server as clients see it: OpenAI's own client, and what no client should send."""

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.cli.conftest import MakeLetters
from tests.cli.serve.conftest import Server, serving

openai = pytest.importorskip("openai")
ASKED: dict[str, Any] = {"max_tokens": 24, "temperature": 0}


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(server: Server, text: str, **more: Any) -> dict[str, Any]:
    return {"model": server.name, "messages": [{"role": "user", "content": text}], **ASKED, **more}


def test_models_health_and_metrics(server: Server, client: Any) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.max_model_len) == (server.name, 4096)
    assert server.ask("/health")[:2] == (200, {"status": "ok"})
    text = server.ask("/metrics")[1]
    assert "optim_live_texts 0" in text and 'optim_requests_total{code="200"}' in text


def test_a_chat_whole_and_streamed(server: Server, client: Any) -> None:
    whole = client.chat.completions.create(**chat(server, "Hello there"))
    (choice,) = whole.choices
    assert (choice.finish_reason, len(choice.message.content)) == ("length", 24)
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (16, 24)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(**chat(server, "Hello there", **options)))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == choice.message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert (chunks[-1].choices, chunks[-1].usage.total_tokens) == ([], 40)
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_conversation_is_read_once(server: Server, client: Any) -> None:
    long = "a word and another one, " * 8
    first = client.chat.completions.create(**chat(server, long))
    again = client.chat.completions.create(**chat(server, long))
    assert again.usage.prompt_tokens_details.cached_tokens == first.usage.prompt_tokens // 128 * 128
    assert again.choices[0].message.content == first.choices[0].message.content


def test_completions(server: Server, client: Any) -> None:
    ask = client.completions.create
    one = ask(model=server.name, prompt="abc", logprobs=2, **ASKED)
    by_ids = ask(model=server.name, prompt=[65, 66, 67], **ASKED)
    assert one.choices[0].text == by_ids.choices[0].text
    chances = one.choices[0].logprobs
    assert "".join(chances.tokens) == one.choices[0].text
    assert all(
        max(top.values()) == c
        for c, top in zip(chances.token_logprobs, chances.top_logprobs, strict=True)
    )
    two = ask(model=server.name, prompt=["abc", "xyz"], **ASKED)
    assert [c.index for c in two.choices] == [0, 1] and two.choices[0].text == one.choices[0].text
    pieces = ask(model=server.name, prompt="abc", stream=True, **ASKED)
    assert "".join(piece.choices[0].text for piece in pieces) == one.choices[0].text


def test_seed_n_stop_and_chances(server: Server, client: Any) -> None:
    ask = client.chat.completions.create
    warm = chat(server, "Hi", temperature=1.0, seed=7, n=3)
    first, second = ask(**warm), ask(**warm)
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices]
    assert len(set(texts)) == 3
    text = ask(**chat(server, "Hi")).choices[0].message.content
    cut = ask(**chat(server, "Hi", stop=[text[5:8]])).choices[0]
    assert cut.finish_reason == "stop" and cut.message.content == text[: text.index(text[5:8])]
    told = ask(**chat(server, "Hi", logprobs=True, top_logprobs=3)).choices[0].logprobs.content
    assert "".join(token.token for token in told) == text
    assert all(token.top_logprobs[0].logprob == token.logprob for token in told)
    bias = {str(ord("z") - 32): 1000}
    assert ask(**chat(server, "Hi", logit_bias=bias)).choices[0].message.content == "z" * 24


def test_responses(server: Server, client: Any) -> None:
    asked = {"model": server.name, "input": "Hello", "temperature": 0, "max_output_tokens": 20}
    whole = client.responses.create(**asked)
    assert (whole.status, len(whole.output_text)) == ("incomplete", 20)
    events = list(client.responses.create(**asked, stream=True))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    assert (events[0].type, events[-1].type) == ("response.created", "response.incomplete")
    told = server.ask("/v1/responses", {**asked, "previous_response_id": "resp_1"})
    assert told[0] == 400 and "previous_response_id" in told[1]["error"]["message"]


BAD: list[tuple[dict[str, Any], int, str]] = [
    ({"messages": []}, 400, "messages"),
    ({"messages": [{"role": "boss", "content": "x"}]}, 400, "role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages"),
    ({"model": "../../etc/passwd"}, 404, "called"),
    ({"temperature": -1}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"n": 5}, 400, "4 at most"),
    ({"stop": ["x"] * 17}, 400, "stop"),
    ({"stop": [""]}, 400, "stop"),
    ({"logit_bias": {"100000": 1}}, 400, "logit_bias"),
    ({"functions": [{"name": "f"}]}, 400, "functions"),
    ({"tools": [{"type": "function"}], "tool_choice": "required"}, 400, "tools.function"),
    ({"response_format": {"type": "xml"}}, 400, "response_format"),
    ({"response_format": {"type": "json_object"}}, 400, "llguidance"),
    ({"messages": [{"role": "user", "content": "x" * 5000}]}, 400, "5005 tokens, the context 4096"),
]


@pytest.mark.parametrize(("change", "status", "words"), BAD, ids=lambda x: str(x)[:30])
def test_what_cannot_be(server: Server, change: dict[str, Any], status: int, words: str) -> None:
    found, said, _ = server.ask("/v1/chat/completions", {**chat(server, "Hi"), **change})
    assert found == status and words in said["error"]["message"], said
    assert set(said["error"]) == {"message", "type", "param", "code"}


RAW = [
    (b"{", 400), (b"\xff\xfe", 400), (b"[]", 400), (b"null", 400), (b"", 400),
    (b"[" * 100_000, 400), (b'{"messages":' + b"[" * 80 + b"]" * 80 + b"}", 400),
    (b" " * (4 << 20) + b"{}", 413),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status"), RAW, ids=range(len(RAW)))
def test_bodies_that_are_none(server: Server, body: bytes, status: int) -> None:
    found, said, _ = server.ask("/v1/chat/completions", body)
    assert found == status and said["error"]["message"]


def test_doors(server: Server) -> None:
    ask = server.ask
    assert ask("/v1/models", headers={"Host": "evil.example"})[0] == 403
    assert ask("/v1/models", headers={"Host": f"localhost:{server.port}"})[0] == 200
    form = {"Content-Type": "text/plain"}
    assert ask("/v1/chat/completions", chat(server, "Hi"), headers=form)[0] == 415
    assert ask("/v1/chat/completions", method="GET")[0] == 405
    assert ask("/etc/passwd")[0] == ask("/../optim.json")[0] == 404
    assert ask("/v1/embeddings", {"input": "x"})[0] == 404
    heads = ask("/health", headers={"X-Request-Id": "mine-1"})[2]
    assert heads["x-request-id"] == "mine-1"
    assert not [name for name in heads if name.lower().startswith("access-control")]
    assert ask("/v1/models", headers={"X-Request-Id": "a\tb"})[2]["x-request-id"] != "a\tb"


def test_more_than_fits_is_refused_and_the_rest_is_as_alone(server: Server) -> None:
    texts = [f"{'the same words ' * (i % 3)}number {i}" for i in range(64)]
    asked = [chat(server, t, max_tokens=250, temperature=0.9, seed=i) for i, t in enumerate(texts)]
    gate = threading.Barrier(64)

    def ask(body: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        gate.wait()
        return server.ask("/v1/chat/completions", body)

    with ThreadPoolExecutor(64) as pool:
        replies = list(pool.map(ask, asked))
    codes = [code for code, _, _ in replies]
    assert (codes.count(200), codes.count(429)) == (20, 44)
    for code, said, heads in replies:
        if code == 429:
            assert said["error"]["code"] == "queue_full" and 1 <= int(heads["retry-after"]) <= 60
    done = [
        (body, said) for body, (code, said, _) in zip(asked, replies, strict=True) if code == 200
    ]
    for body, said in done[::4]:
        again = server.ask("/v1/chat/completions", body)[1]
        assert again["choices"][0]["message"] == said["choices"][0]["message"]


def left_open(server: Server, body: dict[str, Any]) -> socket.socket:
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
    )
    gone = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    gone.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + data)
    return gone


def eventually(server: Server, name: str, value: float) -> None:
    end = time.monotonic() + 30
    while server.metric(name) != value:
        assert time.monotonic() < end, server.ask("/metrics")[1]
        time.sleep(0.02)


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_leave(server: Server, stream: bool) -> None:
    """Four while they are answered or read, three while they wait: all places are free again."""
    before = server.metric('optim_texts_total{reason="cancelled"}')
    bodies = [chat(server, f"{i}" * 900, max_tokens=3000, stream=stream) for i in range(7)]
    open_ones = [left_open(server, body) for body in bodies]
    eventually(server, "optim_live_texts", 7)
    for gone in open_ones:
        gone.close()
    eventually(server, "optim_live_texts", 0)
    assert server.metric("optim_busy_slots") == 0
    assert server.metric('optim_texts_total{reason="cancelled"}') == before + 7


def test_a_key_and_a_stop_in_order(make_letters: MakeLetters, tmp_path: Any) -> None:
    key = tmp_path / "key"
    key.write_text("sesame\n")
    with serving(make_letters(4096, None), "--api-key-file", str(key)) as server:
        assert server.ask("/health")[0] == server.ask("/")[0] == 200
        assert server.ask("/v1/models")[0] == 401
        wrong = {"Authorization": "Bearer other"}
        assert server.ask("/v1/models", headers=wrong)[1]["error"]["code"] == "invalid_api_key"
        right = {"Authorization": "Bearer sesame"}
        assert server.ask("/v1/models", headers=right)[0] == 200
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="sesame") as client:
            chunks = client.chat.completions.create(
                **chat(server, "Hi", max_tokens=800), stream=True
            )
            text = next(chunks) and ""
            server.process.send_signal(signal.SIGTERM)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            assert len(text) == 800
        server.process.wait(timeout=30)
        assert server.process.returncode == 0
