"""What templates may use is what transformers gives them, and renders the same."""

import json
from typing import Any

import pytest

from optim.runtime.text.chat_template import render_template

CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "Grüße <b>'x'</b>"},
    {"role": "assistant", "content": "ok"},
]
TOOL = {"type": "function", "function": {"name": "uhr", "description": "sagt's", "parameters": {}}}
TEMPLATES = {
    "tojson": "{{ tools | tojson }} {{ messages[0].content | tojson }}",
    "tojson ascii": "{{ messages[0].content | tojson(ensure_ascii=True) }}",
    "tojson form": "{{ tools | tojson(indent=2, separators=(',', ':'), sort_keys=True) }}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}",
    "loop controls": "{% for m in messages %}{% if loop.index0 %}{% break %}{% endif %}"
    "{{ m.role }}{% endfor %}",
    "year": "{{ strftime_now('%Y') }}",
    "namespace": "{% set n = namespace(last='') %}{% for m in messages %}"
    "{% set n.last = m.role %}{% endfor %}{{ n.last }}",
    "dict": "{{ dict(a=1).items() | list }}",
    "blocks": "  {% for m in messages %}\n  {{ m.role | upper | trim }}\n  {% endfor %}\nend",
    "prompt": "{{ bos_token }}{% if add_generation_prompt %}go{% endif %}",
    "nothing there": "{{ documents is none }}{{ nobody is defined }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_as_transformers_renders_it(name: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    given: dict[str, Any] = {"add_generation_prompt": True, "bos_token": "<s>"}
    found = render_jinja_template(
        [json.loads(json.dumps(CHAT))], tools=[TOOL], chat_template=TEMPLATES[name], **given
    )
    expected = found[0][0]
    assert render_template(TEMPLATES[name], CHAT, given | {"tools": [TOOL]}) == expected
