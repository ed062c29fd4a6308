"""Chat templates are programs of strangers: each ends in a text or in one clear refusal."""

import os
import signal

import pytest

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.text import chat_template, template_worker
from optim.runtime.text.chat_template import render_template

CHAT = [{"role": "user", "content": "Hi"}]
HOSTILE = {
    "doubling": "{% set n = namespace(x='a') %}{% for i in range(64) %}{% set n.x = n.x ~ n.x %}"
    "{% endfor %}{{ n.x }}",
    "product": "{{ 'a' * 10 ** 10 }}",
    "padding": "{{ 'a'.ljust(10 ** 11) }}",
    "format": "{{ '%10000000000d' % 1 }}",
    "macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "parentheses": "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
    "lists": "{{ " + "[" * 50_000 + "]" * 50_000 + " }}",
    "not": "{{ " + "not " * 50_000 + "1 }}",
    "if": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
    "for": "{% for a in 'ab' %}" * 30 + "{% endfor %}" * 30,
    "long": "{% for i in range(90000) %}{{ messages | tojson }}{% endfor %}",
    "inside": "{{ self.__init__.__globals__ }}",
    "import": "{% import 'os' as os %}",
    "surprise": "{{ messages[0].content() }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_refused(name: str) -> None:
    with pytest.raises(OptimError, match="chat template") as caught:
        render_template(HOSTILE[name], CHAT, {})
    assert caught.value.code == USAGE


def test_an_endless_loop_is_ended_and_the_next_chat_is_rendered() -> None:
    loop = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
    with pytest.raises(OptimError, match=f"more than {template_worker.SECONDS} s"):
        render_template(loop, CHAT, {})
    assert render_template("{{ messages[0].content }}", CHAT, {}) == "Hi"


def test_a_long_chat_may_be_written_more_than_once() -> None:
    long = [{"role": "user", "content": "word " * 500_000}]
    assert len(render_template("{{ messages[0].content * 3 }}", long, {})) == 7_500_000


def test_one_process_answers_all_chats() -> None:
    render_template("x", CHAT, {})
    (worker,) = chat_template._workers
    for text in ("one\n", "two 🙂", "\ud800", ""):
        assert render_template("{{ text }}", CHAT, {"text": text}) == text
    assert chat_template._workers == [worker]


def test_a_process_that_was_killed_is_started_anew() -> None:
    render_template("x", CHAT, {})
    os.kill(chat_template._workers[0]._process.pid, signal.SIGKILL)
    with pytest.raises(OptimError):
        render_template("x", CHAT, {})
    assert render_template("x", CHAT, {}) == "x"


def test_json_as_transformers_writes_it() -> None:
    template = "{{ messages | tojson(ensure_ascii=False, separators=(',', ':')) }}"
    assert render_template(template, CHAT, {}) == '[{"role":"user","content":"Hi"}]'
