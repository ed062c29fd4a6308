"""A model answers the tasks of lm-eval: it scores continuations, and writes until a stop.

https://github.com/EleutherAI/lm-evaluation-harness makes the questions and judges the answers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from optim.recipes.errors import MACHINE, USAGE, OptimError
from optim.runtime.cache.full import StaticCache
from optim.runtime.engine.load import Model
from optim.runtime.engine.sampling import Sampling
from optim.runtime.engine.scheduler import answer_all
from optim.runtime.engine.sequence import Request

Progress = Callable[[int, int, str], None]
MOST_TOKENS = 256  # of an answer whose task does not say how long it may be


@dataclass(frozen=True, slots=True)
class Score:
    """What a task's metric came to, and its standard error where lm-eval gives one."""

    task: str
    metric: str
    value: float
    error: float | None
    questions: int


def run_tasks(
    model: Model, tasks: Sequence[str], limit: int | None, shots: int | None, progress: Progress
) -> list[Score]:
    """The scores of tasks by name, group, tag, or the path of a task's YAML file.

    Raises OptimError: 2 for a task that is not known, 4 where its data is not here.
    """
    manager = TaskManager()
    for task in tasks:
        if not task.endswith((".yaml", ".yml")) and not manager.match_tasks([task]):
            fix = "`lm-eval ls tasks` lists them; a YAML file of your own works too"
            raise OptimError(f"lm-eval has no task {task}", fix, USAGE)
    asked = Answers(model, progress)
    try:
        found = simple_evaluate(
            asked,
            tasks=list(tasks),
            limit=limit,
            num_fewshot=shots,
            bootstrap_iters=1000,
            log_samples=False,
            task_manager=manager,
        )
    except OptimError:
        raise
    except Exception as error:  # data sets come by many ways, each with its own exceptions
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        fix = "their data has to be on this machine, or the hub has to answer"
        raise OptimError(f"lm-eval cannot ask {', '.join(tasks)}: {why}", fix, MACHINE) from error
    return [score for task, row in found["results"].items() for score in _scores(task, row, found)]


def _scores(task: str, row: dict[str, Any], found: dict[str, Any]) -> list[Score]:
    counts = found.get("n-samples", {}).get(task, {})
    scores = []
    for key, value in row.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = row.get(f"{metric}_stderr,{filtered}")
        error = float(error) if isinstance(error, int | float) else None
        name = metric if filtered == "none" else f"{metric} ({filtered})"
        scores.append(Score(task, name, float(value), error, int(counts.get("effective", 0))))
    return scores


class Answers(TemplateLM):  # type: ignore[misc]
    """The model as lm-eval knows one; `progress` hears how many questions are answered."""

    def __init__(self, model: Model, progress: Progress) -> None:
        super().__init__()
        self.model, self.progress = model, progress

    @property
    def eot_token_id(self) -> int:
        """What a text ends with."""
        return min(self.model.tokenizer.eos_ids, default=0)

    @property
    def prefix_token_id(self) -> int:
        """What a text without context goes on from."""
        begin = self.model.tokenizer.bos_id
        return self.eot_token_id if begin is None else begin

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        """Token ids; with what the tokenizer puts before a text unless that is turned off."""
        return self.model.tokenizer.encode(string, special=add_special_tokens is not False)

    def _loglikelihood_tokens(
        self, requests: list[tuple[object, list[int], list[int]]], **_: object
    ) -> list[tuple[float, bool]]:
        """Of each (what was asked, context, continuation): its log chance, whether it is greedy.

        Texts that begin alike, as a question with its choices, are asked one after the other: what
        they share is read once.
        """
        order = sorted(range(len(requests)), key=lambda i: requests[i][1] + requests[i][2])
        found: dict[int, tuple[float, bool]] = {}
        cache, held = self.model.new_cache(), list[int]()
        cuttable = isinstance(cache, StaticCache) and not self.model.one_at_a_time
        for done, i in enumerate(order, 1):
            _asked, context, continuation = requests[i]
            text = (context + continuation)[-self.model.max_context - 1 :]
            first = len(text) - len(continuation) - 1  # predicts the continuation's first token
            if cuttable:
                cache.truncate(min(first, _alike(held, text)))
            else:
                cache = self.model.new_cache()
            ids, before = torch.tensor([text[cache.length : -1]]), cache.length
            logits = self.model.forward(ids, cache, all_logits=True)[0, first - before :]
            held = text[:-1]
            wanted = torch.tensor(continuation, device=logits.device)
            chances = logits.log_softmax(-1).gather(1, wanted[:, None])
            greedy = bool((logits.argmax(-1) == wanted).all())
            found[i] = float(chances.double().sum()), greedy
            self.progress(done, len(order), "continuations")
        return [found[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], **_: object) -> list[float]:
        """The log chance of each whole text."""
        totals = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            room = self.model.max_context
            windows = get_rolling_token_windows(ids, self.prefix_token_id, room, 1)
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(chance for chance, _ in self._loglikelihood_tokens(parts)))
        return totals

    def generate_until(self, requests: list[Instance], **_: object) -> list[str]:
        """What the model writes after each context, up to one of the task's stops."""
        asked = [self._request(*request.args) for request in requests]
        texts = [""] * len(asked)
        answers = answer_all(self.model, asked, context=self.model.max_context)
        for done, (i, answer) in enumerate(answers, 1):
            texts[i] = answer.text
            self.progress(done, len(asked), "answers")
        return texts

    def _request(self, context: str, how: dict[str, Any]) -> Request:
        until = how.get("until", [])
        most = int(how.get("max_gen_toks", MOST_TOKENS))
        drawn = bool(how.get("do_sample", False))
        sampling = Sampling(
            temperature=float(how.get("temperature", 1.0)) if drawn else 0.0,
            top_p=float(how.get("top_p", 1.0)),
            max_tokens=most,
            stop=tuple([until] if isinstance(until, str) else until),
        )
        room = max(1, self.model.max_context - most)
        return Request(self.tok_encode(context)[-room:], sampling)


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return sum(1 for _ in pairs)
