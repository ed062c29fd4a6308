"""Generation and conversations on a tiny random model with a tokenizer of single letters."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from optim.recipes.errors import OptimError
from optim.runtime.cache.full import Policy
from optim.runtime.engine.load import Model, load_model
from optim.runtime.engine.sampling import Sampling
from optim.runtime.engine.scheduler import write
from optim.runtime.engine.sequence import Request
from optim.runtime.engine.sequence import Sequence as Text
from optim.runtime.engine.session import Session
from optim.runtime.engine.slots import Slots

VOCAB = 64


class Letters:
    """A tokenizer whose ids are characters; a chat is `U...;A` for each turn."""

    eos_ids = frozenset({0})

    def encode(self, text: str, special: bool = False) -> list[int]:
        return [ord(letter) - 32 for letter in text if 32 < ord(letter) < 96]

    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        parts = [f"{m['role'][0].upper()}{m['content']};" for m in messages]
        return self.encode("".join(parts) + "A")

    def stream(self) -> Any:
        return self

    def push(self, token: int) -> str:
        return chr(token + 32)

    def flush(self, cut: bool = False) -> str:
        return ""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        initializer_range=0.4,
    )
    folder: Path = tmp_path_factory.mktemp("letters")
    LlamaForCausalLM(config).save_pretrained(folder)
    made = load_model(str(folder), device="cpu")
    made._tokenizer = Letters()  # type: ignore[assignment]
    return made


def _run(model: Model, ids: list[int], sampling: Sampling, context: int = 96) -> Text:
    text = Text(model, Request(ids, sampling), context)
    for _ in write(text, Slots(model, 1, context)):
        pass
    return text


def _greedy(model: Model, ids: list[int], count: int) -> list[int]:
    """Without a cache: the whole text again for every token."""
    ids = list(ids)
    for _ in range(count):
        logits = model.forward(torch.tensor([ids]), model.new_cache())
        ids.append(int(logits.argmax()))
    return ids[-count:]


def test_cached_steps_equal_recomputing_everything(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [5, 9, 30, 2]
    monkeypatch.setattr(Letters, "eos_ids", frozenset())
    text = _run(model, ids, Sampling(max_tokens=40))
    assert text.history[4:] == _greedy(model, ids, 40)
    assert text.reason == "length"


def test_a_stop_id_ends_the_text_and_is_not_part_of_it(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [5, 9, 30, 2]
    wanted = _greedy(model, ids, 12)
    end = wanted[-1]
    monkeypatch.setattr(Letters, "eos_ids", frozenset({end}))
    text = _run(model, ids, Sampling(max_tokens=50))
    assert (text.history[4:], text.reason) == (wanted[: wanted.index(end)], "stop")


def test_the_end_of_the_context_ends_the_reply(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Letters, "eos_ids", frozenset())
    text = _run(model, [3] * 6, Sampling(), 10)
    assert text.reason == "context"
    assert text.count == 5  # four fill the context, the last needs no place
    assert text.history[6:] == _greedy(model, [3] * 6, 5)


def test_a_prompt_beyond_the_context_is_refused_with_the_fix(model: Model) -> None:
    session = Session(model, context=20)
    with pytest.raises(OptimError, match="context 20") as caught:
        next(session.reply("TOOLONG" * 4))
    assert caught.value.code == 2
    assert "--context" in str(caught.value.fix)
    assert session.messages == []
    with pytest.raises(OptimError, match="96"):
        Session(model, context=97)


def test_turns_reuse_the_cache_and_answer_as_without(model: Model) -> None:
    session = Session(model, sampling=Sampling(max_tokens=6))
    first = "".join(session.reply("HELLO"))
    second = "".join(session.reply("AND"))
    assert session.stats.cached_tokens >= len("UHELLO;A")
    assert [m["role"] for m in session.messages] == ["user", "assistant"] * 2
    assert session.messages[1]["content"] == first
    fresh = Session(model, sampling=Sampling(max_tokens=6))
    fresh.messages = session.messages[:2]
    assert "".join(fresh.reply("AND")) == second
    assert fresh.stats.cached_tokens == 0


@pytest.mark.parametrize("stop", ["close", "interrupt"])
def test_a_stopped_reply_is_kept_and_the_next_turn_is_right(
    model: Model, stop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(model, sampling=Sampling(max_tokens=9))
    pieces = session.reply("HELLO")
    said = next(pieces) + next(pieces)
    if stop == "close":
        pieces.close()
    else:
        monkeypatch.setattr(type(model.decoder), "_logits", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            next(pieces)
        monkeypatch.undo()
    assert session.messages[-1] == {"role": "assistant", "content": said}
    assert session.stats.stop_reason == "interrupted"
    fresh = Session(model, sampling=Sampling(max_tokens=9))
    fresh.messages = list(session.messages)
    assert "".join(session.reply("MORE")) == "".join(fresh.reply("MORE"))


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_prompt_is_read_in_chunks_and_may_be_stopped_between_them(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "piece", 8)
    monkeypatch.setattr("optim.runtime.engine.scheduler.TURN", 0)  # a block a step, of two
    session, seen = Session(model, sampling=Sampling(max_tokens=4)), list[tuple[int, int]]()

    def reading(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(session.reply("A" * 30, reading))
    assert seen == [(0, 33)] * 3 + [(8, 33)] * 2 + [(16, 33)]
    assert session.messages == []
    again = "".join(session.reply("A" * 30))
    assert session.stats.cached_tokens == 16
    assert again == "".join(Session(model, sampling=Sampling(max_tokens=4)).reply("A" * 30))
    assert len(seen) == 6  # nobody is told of another reply, nor of decode steps


def test_a_reply_that_goes_round_in_circles_is_noticed(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(model, sampling=Sampling())
    monkeypatch.setattr("optim.runtime.engine.sequence.Sampler", lambda *_: lambda *_: 9)
    "".join(session.reply("HELLO"))
    assert session.stats.repeats
    monkeypatch.undo()
    "".join(Session(model, sampling=Sampling(max_tokens=9)).reply("HELLO"))


def test_taking_a_question_back_and_asking_again_gives_the_same(model: Model) -> None:
    session = Session(model, sampling=Sampling(max_tokens=8, temperature=1.0, seed=3))
    first = "".join(session.reply("HELLO"))
    session.messages = []
    assert "".join(session.reply("HELLO")) == first
    assert session.stats.cached_tokens == session.stats.prompt_tokens - 1


def test_stop_texts_cross_token_borders_and_are_not_shown(model: Model) -> None:
    free = Session(model, sampling=Sampling(max_tokens=12))
    whole = "".join(free.reply("HELLO"))
    stop = whole[4:7]
    session = Session(model, sampling=Sampling(max_tokens=12, stop=(stop,)))
    assert "".join(session.reply("HELLO")) == whole[: whole.index(stop)]
    assert session.stats.stop_reason == "stop"


def test_complete_goes_on_without_a_template(model: Model) -> None:
    session = Session(model, sampling=Sampling(max_tokens=5))
    text = "".join(session.complete("HELLO"))
    ids = Letters().encode("HELLO")
    assert text == "".join(Letters().push(t) for t in _greedy(model, ids, 5))
    assert session.messages == []
    with pytest.raises(OptimError, match="empty"):
        next(session.complete(""))


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_an_endless_conversation_never_fills_the_context(model: Model, bits: int) -> None:
    session = Session(
        model, sampling=Sampling(max_tokens=7), context=40, policy=Policy(bits, "stream")
    )
    for turn in range(30):
        "".join(session.reply(f"T{turn}WORDS"))
        assert session.stats.stop_reason in ("length", "stop")
    assert session.stats.prompt_tokens > 5 * 40
    assert session.stats.cached_tokens > session.stats.prompt_tokens - 20
    assert "forgotten" in session.info()["context"]


@pytest.mark.parametrize("policy", [Policy(8), Policy(4), Policy(kind="stream")], ids=str)
def test_retry_and_undo_under_each_policy(model: Model, policy: Policy) -> None:
    def session() -> Session:
        return Session(model, sampling=Sampling(max_tokens=7), context=64, policy=policy)

    talked = session()
    first = "".join(talked.reply("HELLO"))
    "".join(talked.reply("AND"))
    talked.messages = talked.messages[:2]  # undo
    fresh = session()
    assert "".join(fresh.reply("HELLO")) == first
    assert "".join(talked.reply("OTHER")) == "".join(fresh.reply("OTHER"))
    talked.messages = []  # retry from the start, whatever has been forgotten
    assert "".join(talked.reply("HELLO")) == first


def test_undo_beyond_what_a_stream_forgot_reads_everything_again(model: Model) -> None:
    def session() -> Session:
        return Session(
            model, sampling=Sampling(max_tokens=7), context=40, policy=Policy(kind="stream")
        )

    talked = session()
    first = "".join(talked.reply("HELLO"))
    for _ in range(6):
        "".join(talked.reply("MOREWORDS"))
    talked.messages = []
    assert "".join(talked.reply("HELLO")) == first
    assert talked.stats.cached_tokens == 0


def test_a_reply_ends_with_a_whole_character_and_a_text_with_all_of_its_tokens(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = "\ufffd"
    monkeypatch.setattr(Letters, "flush", lambda _self, cut=False: "" if cut else lost)
    talk = Session(model, sampling=Sampling(max_tokens=1))
    assert lost not in "".join(talk.reply("A"))
    assert "".join(talk.complete("A")).endswith(lost)
