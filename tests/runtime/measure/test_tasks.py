"""lm-eval asks our runtime: scores and answers beside transformers' own."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402

from optim.cli import main  # noqa: E402
from optim.runtime.engine.load import load_model  # noqa: E402
from optim.runtime.measure.tasks import Answers  # noqa: E402

Make = Callable[..., Path]
TASK = """
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""


def ask(kind: str, *questions: tuple[object, ...]) -> list[Instance]:
    return [Instance(kind, {}, question, i) for i, question in enumerate(questions)]


def test_chances_are_those_of_transformers(make_model: Make) -> None:
    import transformers

    folder = make_model("llama", torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ours = Answers(load_model(str(folder), device="cpu"), lambda *_: None)
    pairs = [("a longer question", " one"), ("a longer question", " two!"), ("a", "b"), ("", "cd")]
    found = ours.loglikelihood(ask("loglikelihood", *pairs))
    for (context, continuation), (chance, greedy) in zip(pairs, found, strict=True):
        before = ours.tok_encode(context) or [ours.prefix_token_id]
        after = ours.tok_encode(continuation)
        with torch.no_grad():
            logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
        rows = logits.log_softmax(-1).gather(1, torch.tensor(after)[:, None])
        assert chance == pytest.approx(float(rows.sum()), abs=2e-3)
        assert greedy == (logits.argmax(-1).tolist() == after)
    (whole,) = ours.loglikelihood_rolling(ask("loglikelihood_rolling", ("cd",)))
    assert whole == pytest.approx(found[3][0], abs=1e-4)


def test_a_text_longer_than_the_context_is_cut_at_its_beginning(make_model: Make) -> None:
    ours = Answers(load_model(str(make_model("llama")), device="cpu"), lambda *_: None)
    long = "x" * (2 * ours.model.max_context)
    (chance, _), (short, _) = ours.loglikelihood(
        ask("loglikelihood", (long, "ab"), (long[: ours.model.max_context - 1], "ab"))
    )
    assert chance == pytest.approx(short, abs=1e-3)


def test_it_writes_until_a_stop(make_model: Make) -> None:
    ours = Answers(load_model(str(make_model("llama")), device="cpu"), lambda *_: None)
    free, short = ours.generate_until(
        ask("generate_until", ("ab", {"max_gen_toks": 8}), ("ab", {"max_gen_toks": 2, "until": []}))
    )
    assert free.startswith(short) and len(free) > len(short)
    (cut,) = ours.generate_until(
        ask("generate_until", ("ab", {"max_gen_toks": 8, "until": [free[-1]]}))
    )
    assert cut == free[: free.index(free[-1])]


def run(*words: object) -> int:
    with pytest.MonkeyPatch.context() as patch, open(os.devnull) as nothing:
        patch.setattr(sys, "stdin", nothing)
        patch.setattr(sys, "argv", ["optim", *map(str, words)])
        return main()


@pytest.fixture
def task(tmp_path: Path) -> Path:
    rows = [
        {"question": f"the capital of {a}:", "choices": [" b", " cc"], "answer": i % 2}
        for i, a in enumerate("xyz")
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = tmp_path / "capitals.yaml"
    place.write_text(TASK.replace("DATA", str(data)))
    return place


def test_a_task_whose_data_is_here_needs_no_network(
    make_model: Make, task: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model = make_model("llama")
    assert run("eval", model, "--tasks", task, "--limit", 2, "--json", "--quiet") == 0
    (score,) = json.loads(capfd.readouterr().out)["scores"]
    assert (score["task"], score["metric"], score["questions"]) == ("capitals", "acc", 2)
    assert score["value"] in (0.0, 0.5, 1.0)


def test_tasks_that_are_not_there(make_model: Make, monkeypatch, capfd) -> None:
    model = make_model("llama")
    assert run("eval", model, "--tasks", "no_such_task") == 2
    assert "lm-eval has no task no_such_task" in capfd.readouterr().err
    assert run("eval", model, "--tasks", ",") == 2
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "optim.runtime.measure.tasks", raising=False)
    assert run("eval", model, "--tasks", "arc_easy") == 4
    assert "optim-llm[eval]" in capfd.readouterr().err
