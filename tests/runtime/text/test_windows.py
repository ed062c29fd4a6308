import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optim.recipes.errors import OptimError
from optim.runtime.storage.checkpoint import Checkpoint
from optim.runtime.system.hashes import tokens_sha256
from optim.runtime.text.documents import MIXED, builtin, documents
from optim.runtime.text.self_generated import is_repetitive
from optim.runtime.text.tokenizer import Tokenizer
from optim.runtime.text.windows import (
    _pack,
    _shares,
    calibration_notes,
    calibration_windows,
    document_ids,
    evaluation_windows,
)

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]


def words(count: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(["tree", "stone", "river", "cloud", "house"]) for _ in range(count))


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(words(500))
    return path


def calibrate(spec: str | Path, tokenizer: Tokenizer, **options: Any) -> torch.Tensor:
    known = {"num_samples": 4, "seq_len": 32, "seed": 0} | options
    return calibration_windows(str(spec), tokenizer, **known)


def refused(spec: str | Path, tokenizer: Tokenizer, code: int = 2, **options: Any) -> OptimError:
    with pytest.raises(OptimError) as caught:
        calibrate(spec, tokenizer, **options)
    assert caught.value.code == code
    return caught.value


def test_mixed_is_long_enough_and_seeded(demo_tokenizer: Tokenizer) -> None:
    windows = calibrate("builtin:mixed", demo_tokenizer, num_samples=64, seq_len=512)
    assert windows.shape == (64, 512)
    assert windows.dtype == torch.int64
    again = calibrate("builtin:mixed", demo_tokenizer, num_samples=64, seq_len=512)
    other = calibrate("builtin:mixed", demo_tokenizer, num_samples=64, seq_len=512, seed=1)
    assert tokens_sha256(windows) == tokens_sha256(again) != tokens_sha256(other)
    assert len({tuple(row.tolist()) for row in windows}) == 64


def test_builtin_sizes(demo_tokenizer: Tokenizer) -> None:
    sizes = {
        kind: sum(len(document_ids(d, demo_tokenizer, special=True)) for d in builtin(kind))
        for kind in [*MIXED, "eval"]
    }
    assert sum(sizes[kind] for kind in MIXED) >= 80_000
    assert sizes["eval"] >= 30_000
    # Every kind alone fills its share of 64 x 512.
    assert all(sizes[kind] >= share * 512 for kind, share in _shares(64).items())


def test_builtin_texts_are_disjoint() -> None:
    """No run of 200 characters is in both: the lines of a licence header are shorter."""
    mixed = "".join(d if isinstance(d, str) else json.dumps(d) for d in documents("builtin:mixed"))
    evaluation = "".join(str(d) for d in documents("builtin:eval"))
    grams = {mixed[k : k + 60] for k in range(len(mixed) - 60)}
    shared = {k for k in range(0, len(evaluation) - 60, 20) if evaluation[k : k + 60] in grams}
    runs = [k for k in shared if {k + 20 * step for step in range(8)} <= shared]
    assert not runs, evaluation[runs[0] : runs[0] + 200]


def test_builtin_texts_hold_no_evaluation_text_of_the_figures() -> None:
    for spec in ("builtin:mixed", "builtin:eval"):
        text = "".join(str(document) for document in documents(spec))
        assert "Administrator's Handbook" not in text
        assert "Falcot" not in text


def test_few_samples_are_mixed_too() -> None:
    assert _shares(16) == MIXED
    assert sum(_shares(1).values()) == 1


@given(st.integers(1, 500))
def test_shares_add_up(num_samples: int) -> None:
    shares = _shares(num_samples)
    assert sum(shares.values()) == num_samples
    for kind, weight in MIXED.items():
        assert abs(shares[kind] - num_samples * weight / 16) < 1


@given(
    st.lists(st.lists(st.integers(0, 9), max_size=20), max_size=8),
    st.integers(1, 12),
    st.integers(1, 60),
)
def test_pack_keeps_order_and_loses_only_the_rest(
    parts: list[list[int]], length: int, tokens: int
) -> None:
    windows = _pack(parts, length, tokens)
    joined = [token for part in parts for token in part]
    flat = [token for window in windows for token in window]
    assert all(len(window) == length for window in windows)
    assert flat == joined[: len(flat)]
    assert len(flat) == min(len(joined), max(tokens, length)) // length * length


def test_text_file(text_file: Path, demo_tokenizer: Tokenizer) -> None:
    windows = calibrate(text_file, demo_tokenizer)
    ids = demo_tokenizer.encode(text_file.read_text())
    starts = {tuple(ids[k : k + 32]) for k in range(0, len(ids) - 31, 32)}
    assert windows.shape == (4, 32)
    assert {tuple(row.tolist()) for row in windows} <= starts


def test_folder_of_everything(tmp_path: Path, demo_tokenizer: Tokenizer) -> None:
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.md").write_text("first")
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "c.jsonl").write_text(
        '{"text": "third"}\n\n' + json.dumps({"messages": CHAT}) + "\n"
    )
    table = pyarrow.table({"text": ["fourth", "fifth"]})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    assert list(documents(str(tmp_path))) == ["second", "third", CHAT, "fourth", "fifth", "first"]


def test_chats_go_through_the_template(tmp_path: Path, demo_tokenizer: Tokenizer) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": CHAT, "id": 3}) + "\n")
    (window,) = evaluation_windows(str(path), demo_tokenizer, window=24).tolist()
    assert window == demo_tokenizer.chat(CHAT, generation_prompt=False)[:24]
    bare = Tokenizer(demo_tokenizer.backend, None, {}, None, set())
    plain = bare.decode(document_ids(CHAT, bare, special=False))
    assert plain == "user: Hi\n\nassistant: Hello!\n"


def test_parquet_of_chats(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"messages": [CHAT]}), tmp_path / "c.parquet")
    assert list(documents(str(tmp_path / "c.parquet"))) == [CHAT]


def test_a_turn_that_calls_tools_may_have_no_text(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}]}
    path.write_text(json.dumps({"messages": [CHAT[0], call]}))
    assert list(documents(str(path))) == [[CHAT[0], {"role": "assistant", "content": ""}]]


NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
)


@pytest.mark.parametrize("template", [NO_SYSTEM, "{{ raise_exception('never') }}"])
def test_a_template_that_takes_no_system_message(
    template: str, demo: Checkpoint, tmp_path: Path
) -> None:
    tokenizer = demo.tokenizer()
    assert tokenizer.takes_system
    assert calibration_notes(tokenizer) == []
    refusing = replace(tokenizer, template=template)
    assert not refusing.takes_system
    assert "no system message" in calibration_notes(refusing)[0]
    chat = [{"role": "system", "content": "Be brief."}, *CHAT]
    if template == NO_SYSTEM:
        text = refusing.decode(document_ids(chat, refusing, special=False))
        assert text == "[user] Be brief.\n\nHi\n[assistant] Hello!\n"
        assert calibrate("builtin:mixed", refusing, num_samples=8).shape == (8, 32)
    else:  # it refuses every chat: not a matter of the system message
        with pytest.raises(OptimError, match="never"):
            document_ids(chat, refusing, special=False)


def test_other_text_column(tmp_path: Path, demo_tokenizer: Tokenizer) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"body": words(300), "title": "x"}) + "\n")
    assert calibrate(path, demo_tokenizer, text_column="body").shape == (4, 32)
    error = refused(path, demo_tokenizer)
    assert "body, title" in error.message
    assert "--text-column" in str(error.fix)
    assert ":1" in error.message


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"text": "ok"}\n{"text": \n'),
        ("a.jsonl", b"[1, 2]\n"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}\n'),
        ("a.jsonl", b"\xff\xfe\n"),
        ("a.jsonl", b"[" * 100_000),
        ("a.parquet", b"PAR1 not really"),
        ("a.txt", b"\xff\xfe\x00"),
        ("a.txt", b""),
        ("a.jsonl", b""),
    ],
)
def test_bad_files(name: str, content: bytes, tmp_path: Path, demo_tokenizer: Tokenizer) -> None:
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, demo_tokenizer)


def test_empty_folder(tmp_path: Path, demo_tokenizer: Tokenizer) -> None:
    assert ".jsonl" in refused(tmp_path, demo_tokenizer).message


@pytest.mark.parametrize("spec", ["./no.txt", "no.jsonl", "/no/folder", "nothing", "builtin:x"])
def test_specs_that_do_not_exist(spec: str, demo_tokenizer: Tokenizer) -> None:
    assert "there is no" in refused(spec, demo_tokenizer).message


def test_too_short_says_how_short(text_file: Path, demo_tokenizer: Tokenizer) -> None:
    error = refused(text_file, demo_tokenizer, num_samples=50)
    have = len(demo_tokenizer.encode(text_file.read_text())) // 32
    assert f"{have} full windows" in error.message
    assert f"--num-samples {have}" in str(error.fix)
    assert "--seq-len" in str(refused(text_file, demo_tokenizer, seq_len=10_000).fix)
    assert "too short" in refused("builtin:mixed", demo_tokenizer, num_samples=10**5).message


def test_evaluation_is_the_text_in_order(text_file: Path, demo_tokenizer: Tokenizer) -> None:
    windows = evaluation_windows(str(text_file), demo_tokenizer, window=64)
    ids = demo_tokenizer.encode(text_file.read_text())
    assert windows.shape == (len(ids) // 64, 64)
    assert windows.flatten().tolist() == ids[: windows.numel()]
    first = evaluation_windows(str(text_file), demo_tokenizer, window=64, max_windows=2)
    assert torch.equal(first, windows[:2])
    with pytest.raises(OptimError, match="too short") as caught:
        evaluation_windows(str(text_file), demo_tokenizer, window=10_000)
    assert caught.value.code == 2


def test_a_long_text_is_cut_but_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    book = "\n".join(words(200, seed) for seed in range(150))
    path.write_text(book + "x" * 70_000)
    pieces = [str(piece) for piece in documents(str(path))]
    assert len(pieces) > 2
    assert "".join(pieces) == book + "x" * 70_000
    assert pieces[0].endswith("\n")


def test_hub_data_set(monkeypatch: pytest.MonkeyPatch, demo_tokenizer: Tokenizer) -> None:
    datasets = pytest.importorskip("datasets")
    asked = {}

    def load(name: str, configuration: str | None, **options: Any) -> Any:
        asked.update(options, name=name, configuration=configuration)
        made = datasets.Dataset.from_list([{"text": words(100, seed)} for seed in range(20)])
        return made.to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    windows = calibrate("owner/set:small", demo_tokenizer, split="test")
    assert asked == {
        "name": "owner/set",
        "configuration": "small",
        "split": "test",
        "streaming": True,
    }
    assert torch.equal(windows, calibrate("owner/set:small", demo_tokenizer, split="test"))


def test_hub_data_set_out_of_reach(
    monkeypatch: pytest.MonkeyPatch, demo_tokenizer: Tokenizer
) -> None:
    datasets = pytest.importorskip("datasets")

    def load(*args: Any, **options: Any) -> Any:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load)
    error = refused("owner/set", demo_tokenizer, code=4)
    assert "owner/set" in error.message
    assert "builtin:mixed" in str(error.fix)


def test_self_is_sampled_and_seeded(demo_tokenizer: Tokenizer) -> None:
    seeds = []

    def generate(prompt: list[int], count: int, seed: int) -> list[int]:
        seeds.append(seed)
        return torch.randint(3, 9000, (count,), generator=torch.manual_seed(seed)).tolist()

    windows = calibrate("self", demo_tokenizer, generate=generate, seed=7)
    assert windows.shape == (4, 32)
    assert len(set(seeds)) == len(seeds)
    assert torch.equal(windows, calibrate("self", demo_tokenizer, generate=generate, seed=7))


def test_self_throws_repetition_away(demo_tokenizer: Tokenizer) -> None:
    calls = []

    def stuck(prompt: list[int], count: int, seed: int) -> list[int]:
        calls.append(seed)
        return [5, 6] * (count // 2)

    error = refused("self", demo_tokenizer, code=1, generate=stuck)
    assert "repeats itself" in error.message
    assert len(calls) < 50
    refused("self", demo_tokenizer)


def test_repetition() -> None:
    assert is_repetitive([1, 2, 3] * 40)
    assert is_repetitive([1, 2, 3])
    assert not is_repetitive(list(range(100)))


def test_hash_depends_on_values_and_shape_alone() -> None:
    ids = torch.arange(12).reshape(3, 4)
    assert (
        tokens_sha256(ids) == tokens_sha256(ids.to(torch.int32)) == tokens_sha256(ids.T.clone().T)
    )
    assert tokens_sha256(ids) != tokens_sha256(ids.reshape(4, 3))
    assert tokens_sha256(ids) != tokens_sha256(ids + 1)
