"""Answers that have to follow a JSON schema do, whatever the model would have said."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from optim.recipes.errors import OptimError
from optim.runtime.engine.grammar import Guided, words_of
from optim.runtime.engine.load import load_model
from optim.runtime.engine.sampling import Sampling
from optim.runtime.engine.scheduler import Scheduler
from optim.runtime.engine.sequence import Request, Sequence
from optim.runtime.engine.slots import Slots

pytest.importorskip("llguidance")
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_schema_is_followed(make_model: Callable[..., Path], temperature: float) -> None:
    model = load_model(str(make_model("llama")), device="cpu", threads=1)
    words, tokenizer = words_of(model.tokenizer), model.tokenizer
    loop = Scheduler(Slots(model, 3, 128))
    texts = []
    for seed in range(3):
        sampling = Sampling(temperature=temperature, seed=seed)
        texts.append(
            Sequence(
                model,
                Request([9, 8], sampling, bias=((35, -100.0),)),
                128,
                Guided(words, SCHEMA),
            )
        )
        loop.submit(texts[-1])
    while not loop.idle:
        loop.step()
    for text in texts:
        assert text.reason in ("stop", "context")
        written = tokenizer.decode(text.history[2:])
        if text.reason == "stop":
            found = json.loads(written)
            assert set(found) == {"n", "ok"} and isinstance(found["ok"], bool)
        else:  # blanks between the parts, without an end
            assert written.strip().startswith("{")
    with pytest.raises(OptimError, match="schema"):
        Guided(words, {"type": "no such"})
