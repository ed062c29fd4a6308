"""`optim run` on a real, tiny model with random weights and a tokenizer of letters."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pexpect
import pytest

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(make_letters: Callable[..., str]) -> str:
    return make_letters(32768, None)


def test_the_same_answer_by_text_by_json_and_by_pipe(optim: Run, model: str) -> None:
    code, text, err = optim(model, "hello", "--max-tokens", "12")
    assert (code, len(text)) == (0, 13)
    assert err == "the answer was cut after 12 tokens: --max-tokens allows no more\n"
    assert optim(model, "--max-tokens", "12", piped=b"hello\n") == (0, text, err)
    assert optim(model, "--max-tokens", "12", "--quiet", "hello") == (0, text, "")
    code, out, _ = optim(model, "hello", "--max-tokens", "12", "--json")
    answer = json.loads(out)
    assert code == 0
    assert answer["text"] + "\n" == text
    assert (answer["tokens"], answer["stop_reason"]) == (12, "length")
    assert answer["prompt_tokens"] == len("u:hello|a:")


def test_raw_leaves_the_template_out(optim: Run, model: str) -> None:
    _, out, _ = optim(model, "hello", "--raw", "--max-tokens", "3", "--json")
    assert json.loads(out)["prompt_tokens"] == len("hello")


def test_seed_and_stop(optim: Run, model: str) -> None:
    drawn = [model, "hi", "--temperature", "1.5", "--seed", "4", "--max-tokens", "30"]
    _, text, _ = optim(*drawn)
    assert optim(*drawn)[1] == text
    assert optim(*drawn[:-3], "5", "--max-tokens", "30")[1] != text
    cut = text[10:12]
    assert optim(*drawn, "--stop", cut)[1] == text.split(cut)[0] + "\n"


def test_too_long_a_prompt_is_refused(optim: Run, model: str) -> None:
    code, out, err = optim(model, "hello there", "--context", "10")
    assert (code, out) == (2, "")
    assert err == (
        "error: the prompt is 16 tokens, the context 10\n"
        "  fix: shorten it, or give a larger --context (32768 at most)\n"
    )


def test_no_fix_names_what_cannot_help(optim: Run, make_letters: Callable[..., str]) -> None:
    small = make_letters(20, None)
    _, _, err = optim(small, "hello " * 5)
    assert err.endswith("the context 20\n  fix: shorten it\n")
    _, _, err = optim(small, "--chat", piped=b"hi\n" + b"hello " * 5 + b"\n")
    assert err.endswith("fix: shorten it, or /clear the conversation\n")


def test_without_a_limit_an_answer_may_fill_the_context(
    optim: Run, make_letters: Callable[..., str]
) -> None:
    code, out, err = optim(make_letters(40, None), "hello", "--raw", "--json")
    answer = json.loads(out)
    assert (code, answer["tokens"], answer["stop_reason"]) == (0, 36, "context")
    assert err.endswith(
        "the answer was cut, the context of 40 tokens is full: shorten the prompt\n"
    )


def test_the_makers_sampling_is_the_default(optim: Run, make_letters: Callable[..., str]) -> None:
    model = make_letters(64, None)
    path = Path(model) / "generation_config.json"
    path.write_text('{"do_sample": true, "temperature": 1.5, "top_p": 0.9}')
    drawn = ["--max-tokens", "20", "--seed", "3", "--json"]
    out = json.loads(optim(model, "hi", *drawn, greedy=False)[1])
    assert [out["sampling"][k] for k in ("temperature", "top_k", "top_p")] == [1.5, 50, 0.9]
    assert json.loads(optim(model, "hi", *drawn, greedy=False)[1])["text"] == out["text"]
    assert json.loads(optim(model, "hi", *drawn)[1])["text"] != out["text"]
    _, _, err = optim(model, "--chat", piped=b"/set\n", greedy=False)
    assert "temperature 1.5, top_k 50, top_p 0.9 · /help" in err
    assert "temperature = 1.5" in err
    path.write_text('{"temperature": "hot"}')
    code, _, err = optim(model, "hi")
    assert (code, err.splitlines()[0].split(": ", 2)[2]) == (2, "temperature cannot be 'hot'")


def test_what_a_greedy_reply_does_not_use_is_said(optim: Run, model: str) -> None:
    _, _, err = optim(model, "hi", "--top-p", "0.5", "--max-tokens", "1")
    assert err.startswith("temperature 0 takes the likeliest token: top_p has no effect\n")


@pytest.mark.parametrize("flag", ["--temperature=-1", "--top-p=0", "--max-tokens=0", "--stop="])
def test_bad_parameters_are_refused(optim: Run, flag: str) -> None:
    code, out, err = optim("/nowhere", "hi", flag)
    assert (code, out) == (2, "")
    assert "nowhere" not in err


def test_ctrl_c_at_a_terminal_cuts_reply_and_cache(model: str, tmp_path: Path) -> None:
    extra = {"XDG_STATE_HOME": str(tmp_path), "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"}
    child = pexpect.spawn(
        sys.executable,
        [
            "-m",
            "optim.cli",
            "run",
            model,
            "--max-tokens",
            "30000",
            "--threads",
            "1",
            "--temperature",
            "0",
        ],
        env={**os.environ, **extra},
        cwd=tmp_path,
        encoding="utf-8",
        timeout=60,
        dimensions=(30, 100),
    )
    child.expect("Ctrl-D leaves")
    child.expect(">>>")
    child.send("hi\r")
    child.expect(r"[^\s\x1b]{20}")
    child.send("\x03")
    child.expect(r"\[(\d+) tokens · .*prompt 7 · stopped\]")
    assert child.match is not None
    stopped_at = int(child.match[1])
    assert 20 <= stopped_at < 30000
    child.expect(">>>")
    child.send("/save cut.json\r")
    child.expect("saved cut.json")
    child.expect(">>>")
    child.send("/set max_tokens 5\r")
    child.expect(">>>")
    child.send("go on\r")
    child.expect(r"\[5 tokens · .*prompt (\d+) · reached max_tokens\]")
    second_prompt = int(child.match[1])
    child.expect(">>>")
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    reply = json.loads((tmp_path / "cut.json").read_text())["messages"][1]["content"]
    assert len(reply) == stopped_at
    assert second_prompt == len(f"u:hi|a:{reply}|u:go on|a:")


@pytest.mark.parametrize(
    "flags", [("--kv-bits", "5"), ("--kv-policy", "h2o"), ("--seed", "2" * 20)]
)
def test_what_no_cache_and_no_seed_is_refused(
    optim: Run, model: str, flags: tuple[str, str]
) -> None:
    code, out, err = optim(model, "hello", *flags)
    assert (code, out) == (2, "")
    assert flags[1] in err
    assert "fix:" in err


def test_a_stream_answers_past_its_context(optim: Run, model: str) -> None:
    flags = ("--kv-policy", "stream", "--context", "32", "--kv-bits", "8", "--max-tokens", "60")
    code, out, _ = optim(model, "hello " * 20, *flags)
    assert (code, len(out)) == (0, 61)


def test_a_saved_conversation_goes_on_from_its_cache(
    optim: Run, model: str, tmp_path: Path
) -> None:
    path = tmp_path / "talk.json"
    _, first, err = optim(
        model, "--chat", "--max-tokens", "5", piped=f"hello\n/save {path}\nmore\n".encode()
    )
    assert "its cache" in err
    assert (tmp_path / "talk.json.cache.safetensors").is_file()
    flags = ("--chat", "--max-tokens", "5", "--stats")
    _, again, err = optim(model, *flags, piped=f"/load {path}\nmore\n".encode())
    assert again.splitlines()[-1] == first.splitlines()[-1]
    assert "read again" not in err
    (tmp_path / "talk.json.cache.safetensors").unlink()
    _, third, err = optim(model, *flags, piped=f"/load {path}\nmore\n".encode())
    assert third == again
    assert "there is no cache beside it: the conversation will be read again" in err


def test_a_kernel_that_is_not_used_is_said_once(
    optim: Run, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = {"step": "no C compiler", "w4a8": "no C compiler", "bf16": "it disagrees"}
    monkeypatch.setattr("optim.runtime.engine.load.REFUSED", refused)
    monkeypatch.setenv("OPTIM_NO_C", "0")
    said = (
        "not used here: step, w4a8 (no C compiler); bf16 (it disagrees)."
        " torch computes instead, slower: `optim doctor` says more\n"
    )
    _, _, err = optim(model, "--chat", "--max-tokens", "2", piped=b"hi\nho\n")
    assert err.count(said) == 1
    monkeypatch.setenv("OPTIM_NO_C", "1")  # then it was asked for
    assert "not used here" not in optim(model, "hi", "--max-tokens", "2")[2]
