"""`optim run --batch`: every answer is the one the prompt gets alone; bad lines do not stop it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(make_letters: Callable[..., str]) -> str:
    return make_letters(96, 65)


def _file(folder: Path, *lines: Any) -> str:
    path = folder / "asked.jsonl"
    texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(texts) + b"\n")
    return str(path)


PROMPTS = ["hello", "a", "what is it that you want from me?", "12", "z" * 40, "~", "once upon"]


def test_each_answer_is_the_one_it_gets_alone(optim: Run, model: str, tmp_path: Path) -> None:
    path = _file(tmp_path, *({"prompt": p, "id": i} for i, p in enumerate(PROMPTS)))
    flags = ("--max-tokens", "30", "--context", "80")
    code, out, err = optim(model, "--batch", path, "--batch-size", "3", *flags)
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [row["id"] for row in rows] == list(range(len(PROMPTS)))
    for prompt, row in zip(PROMPTS, rows, strict=True):
        alone = json.loads(optim(model, prompt, "--json", *flags)[1])
        for key in ("text", "tokens", "stop_reason", "prompt_tokens"):
            assert row[key] == alone[key], (prompt, key)
    assert len({row["stop_reason"] for row in rows}) > 1
    assert "batch 7/7" in err


def test_a_bad_line_is_named_and_the_rest_answered(optim: Run, model: str, tmp_path: Path) -> None:
    bad: dict[int, Any] = {
        2: b"{no json",
        3: b'{"prompt": "\xff"}',
        4: {"prompt": "hi", "tempature": 1},
        5: {"id": "five"},
        6: {"prompt": "hi", "max_tokens": 0},
        7: {"prompt": "hi", "seed": 2**64},
        8: {"prompt": "x" * 200, "id": "eight"},
        9: {"messages": [{"role": "robot", "content": "hi"}]},
        10: [1],
        11: b"[" * 100_000,
        13: {"prompt": 3},
    }
    good = {1: {"prompt": "hi", "id": "one"}, 12: b"  ", 14: {"prompt": "hi", "stop": ["q"]}}
    lines = [line for _, line in sorted((bad | good).items())]
    code, out, err = optim(model, "--batch", _file(tmp_path, *lines), "--max-tokens", "5")
    rows = {row["line"]: row for row in map(json.loads, out.splitlines())}
    assert code == 1
    assert list(rows) == [n for n in range(1, 15) if n != 12]
    assert set(bad) == {n for n, row in rows.items() if "error" in row}
    assert (rows[1]["id"], rows[8]["id"]) == ("one", "eight")
    for number in bad:
        assert f"line {number}: " in err
    assert "not JSON" in rows[2]["error"]
    assert "UTF-8" in rows[3]["error"]
    assert "tempature" in rows[4]["error"]
    assert "context 96" in rows[8]["error"]


def test_a_line_has_its_own_parameters(optim: Run, model: str, tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "so"},
    ]
    drawn = {"temperature": 1.5, "seed": 4, "max_tokens": 12}
    path = _file(tmp_path, {"prompt": "hi", **drawn}, {"messages": turns}, {"prompt": "hi"})
    code, out, _ = optim(model, "--batch", path, "--max-tokens", "6")
    rows = [json.loads(line) for line in out.splitlines()]
    flags = ("--temperature", "1.5", "--seed", "4", "--max-tokens", "12", "--json")
    alone = json.loads(optim(model, "hi", *flags)[1])
    assert code == 0
    assert rows[0]["text"] == alone["text"]
    assert rows[1]["prompt_tokens"] == len("u:hi|a:yes|u:so|a:")
    assert rows[2]["tokens"] <= 6


def test_rows_go_to_a_new_file_only(optim: Run, model: str, tmp_path: Path) -> None:
    path, rows = _file(tmp_path, {"prompt": "hi"}), tmp_path / "rows.jsonl"
    flags = (model, "--batch", path, "--max-tokens", "4", "-o")
    assert optim(*flags, str(rows))[:2] == (0, "")
    kept = rows.read_text()
    assert json.loads(kept)["line"] == 1
    code, _, err = optim(*flags, str(rows))
    assert (code, rows.read_text()) == (2, kept)
    assert "exists" in err


@pytest.mark.parametrize("kind", ["missing", "empty", "prompt", "json", "bits"])
def test_bad_use_is_explained(optim: Run, model: str, tmp_path: Path, kind: str) -> None:
    path = _file(tmp_path, {"prompt": "a"}, {"prompt": "b"})
    extra = {
        "prompt": ["hello"],
        "json": ["--json"],
        "bits": ["--kv-bits", "5"],
    }.get(kind, [])
    if kind == "missing":
        path = str(tmp_path / "no.jsonl")
    elif kind == "empty":
        path = _file(tmp_path, b" ")
    code, out, err = optim(model, "--batch", path, *extra)
    assert (code, out) == (2, "")
    assert "fix:" in err
