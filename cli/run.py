"""`optim run`: answer once, or talk.

A prompt on the command line or on standard input is answered once; both together are joined, the
piped text first. With neither, at a terminal, a conversation begins. The answer is all that goes to
standard output.
"""

from __future__ import annotations

import io
import select
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optim.cli import ui
from optim.cli.conversation import chat as chats
from optim.cli.conversation.input import decode, editor, plain
from optim.cli.options import AS_ADVISED, Asking, Drawing, Rows, Running
from optim.recipes.errors import USAGE, OptimError

if TYPE_CHECKING:
    from optim.runtime.cache.full import Policy
    from optim.runtime.engine.load import Model
    from optim.runtime.engine.sampling import Sampling
    from optim.runtime.engine.session import Session
    from optim.runtime.system.free_cores import Meter

INTERRUPTED = 130
LOOK_AGAIN = 0.3  # seconds
SILENCE = 10  # seconds to wait for the first byte of a pipe when there is a prompt too


def run(source: str, prompt: str | None, asking: Asking, drawing: Drawing = AS_ADVISED) -> int:
    """Run the model at `source`; returns the exit code (130 if Ctrl-C stopped the one answer).

    Raises OptimError: code 2 for an empty prompt, one that is not UTF-8 or longer than the context.
    """
    ui.notes.quiet = asking.quiet
    talking = asking.chat or (prompt is None and _at_terminal())
    text = "" if talking else _question(prompt)
    if asking.draft is not None and asking.speculate != "auto":
        raise OptimError("--draft guesses by itself", "leave --speculate out", USAGE)
    if talking and (asking.json or asking.raw):
        flag = "--json" if asking.json else "--raw"
        raise OptimError(f"{flag} needs a prompt", fix='optim run MODEL "PROMPT"', code=USAGE)
    if asking.raw and asking.system:
        fix = "leave one of them out"
        raise OptimError("--raw has no place for a --system prompt", fix, USAGE)
    session = _open(source, asking, drawing)
    if talking:
        return _talk(session, asking)
    return _once(session, text, asking)


def run_file(source: str, prompt: str | None, rows: Rows, asking: Asking, drawing: Drawing) -> int:
    """Answer a file of JSON lines; returns the exit code (1 if a line failed).

    Raises OptimError: code 2 for a file without lines, flags that do not go together, or an
    output that exists.
    """
    assert rows.batch is not None
    from optim.cli.batch import How, read_lines, run_batch

    ui.notes.quiet = asking.quiet
    if prompt is not None or asking.chat or asking.json:
        fix = "optim run MODEL --batch FILE.jsonl [-o ROWS.jsonl]"
        raise OptimError("--batch goes without a prompt, --chat and --json", fix, USAGE)
    if rows.output is not None and Path(rows.output).exists():
        raise OptimError(f"{rows.output} exists", "choose another name, or remove it", USAGE)
    if asking.speculate == "lookup" or asking.draft is not None:
        fix = "leave --speculate and --draft out: a batch fills its steps with other texts"
        raise OptimError("--batch guesses no tokens ahead", fix, USAGE)
    lines = read_lines(rows.batch)
    sampling, policy, model = load(source, asking, drawing, raw=asking.raw)
    context = model.context(asking.context)
    how = How(_utf8(asking.system, "the system prompt"), asking.raw, sampling, context)
    return run_batch(model, lines, how, rows.output, rows.batch_size, policy)


def _at_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _question(prompt: str | None) -> str:
    """The one question: piped text, then the prompt of the command line."""
    own = None if prompt == "-" else prompt
    parts = [decode(_piped(wait=own is None), "standard input").strip("\r\n")]
    if own is not None:
        parts.append(_utf8(own, "the prompt"))
    text = "\n\n".join(part for part in parts if part.strip())
    if not text:
        raise OptimError("the prompt is empty", fix='optim run MODEL "PROMPT"', code=USAGE)
    return text


def _piped(wait: bool) -> bytes:
    """All of standard input. Beside a prompt, an open pipe that stays silent does not block."""
    if sys.stdin is None or _at_terminal():
        return b""
    if not wait and not select.select([sys.stdin], [], [], SILENCE)[0]:
        ui.note(f"nothing came on standard input in {SILENCE} s: answering the prompt alone")
        return b""
    return sys.stdin.buffer.read()


def _utf8(text: str, name: str) -> str:
    return decode(text.encode(errors="surrogateescape"), name)


def load(
    source: str, running: Running, drawing: Drawing, *, raw: bool = False
) -> tuple[Sampling, Policy, Model]:
    """What is typed is checked before the weights are read."""
    ui.status("loading ...")
    try:
        return _loaded(source, running, drawing, raw)
    finally:
        ui.status()


def _loaded(
    source: str, running: Running, drawing: Drawing, raw: bool
) -> tuple[Sampling, Policy, Model]:
    from optim.runtime.system.torch_import import import_torch

    import_torch()
    from optim.runtime.system.free_cores import Meter

    meter = Meter()
    from optim.runtime.cache.full import Policy
    from optim.runtime.decoder.linears.source import Form
    from optim.runtime.engine.drafts import lookup
    from optim.runtime.engine.load import load_model
    from optim.runtime.engine.sampling import Sampling
    from optim.runtime.storage.open import open_checkpoint
    from optim.runtime.text import chat_template

    Sampling(**drawing.given)
    lookup(running.speculate)
    policy = Policy(running.kv_bits, running.kv_policy)
    form: Form = "exact" if running.exact else "planes"
    checkpoint = open_checkpoint(source)
    sampling = _sampling(checkpoint.folder, drawing.given)
    ui.status(f"loading {checkpoint.name} ...")
    if not raw:
        chat_template.begin()
    model = load_model(
        checkpoint,
        device=running.device,
        threads=running.threads,
        form=form,
        offload=running.offload,
    )
    ui.status()
    for words in filter(None, (model.refused, model.advice)):
        ui.note(words)
    if running.threads is None and model.device.type == "cpu":
        _share(_free_cores(meter))
    return sampling, policy, model


def _sampling(folder: Path, asked: dict[str, Any]) -> Sampling:
    """What was asked, over what the model's makers advise."""
    from optim.runtime.engine.sampling import DRAWN, Sampling, default_sampling

    sampling = Sampling(**{**default_sampling(folder), **asked})
    if idle := [key for key in DRAWN if key in asked and sampling.temperature == 0 != asked[key]]:
        ui.note(f"temperature 0 takes the likeliest token: {', '.join(idle)} has no effect")
    return sampling


def _free_cores(meter: Meter) -> int | None:
    """What others leave free now: who was busy while the model was loaded may just have ended."""
    import torch

    free = meter.free_cores()
    if free is None or free >= torch.get_num_threads():
        return free
    again = type(meter)()
    time.sleep(LOOK_AGAIN)
    return max(free, again.free_cores() or free)


def _share(free: int | None) -> None:
    """Leave cores that others use to them."""
    import torch

    cores = torch.get_num_threads()
    if free is not None and free < cores:
        torch.set_num_threads(free)
        ui.note(
            f"Other programs keep {cores - free} of {cores} cores busy, so this runs on {free}"
            f" thread{'s' * (free > 1)}; --threads {cores} takes them all."
        )


def _open(source: str, asking: Asking, drawing: Drawing) -> Session:
    sampling, policy, model = load(source, asking, drawing, raw=asking.raw)
    from optim.runtime.engine.session import Session

    draft = None if asking.draft is None else _draft(asking.draft, asking)
    return Session(
        model,
        system=_utf8(asking.system, "the system prompt"),
        sampling=sampling,
        context=asking.context,
        policy=policy,
        speculate=asking.speculate,
        draft=draft,
    )


def _draft(source: str, asking: Asking) -> Model:
    """The model that guesses."""
    from optim.runtime.engine.load import load_model

    ui.status(f"loading {source} ...")
    try:
        return load_model(source, device=asking.device)
    finally:
        ui.status()


def _once(session: Session, text: str, asking: Asking) -> int:
    raw = asking.raw
    if not raw and not asking.system and not session.model.tokenizer.has_chat_template:
        ui.note("no chat template: the text is continued as it is")
        raw = True
    start = partial(session.complete if raw else session.reply, text)
    if asking.json:
        return _once_json(session, start)
    stopped = chats.stream(session, start, sys.stdout, asking.markdown and not raw)
    ui.say("")
    if asking.stats or stopped:
        ui.note(chats.describe(session.stats, stopped))
    _say_cut(session, stopped)
    return INTERRUPTED if stopped else 0


def _say_cut(session: Session, stopped: bool) -> None:
    if not stopped and (why := chats.cut(session)) is not None:
        ui.note(why)


def _once_json(session: Session, start: chats.Start) -> int:
    text = io.StringIO()
    stopped = chats.stream(session, start, text)
    stats = session.stats
    answer = {
        "text": text.getvalue(),
        "tokens": stats.new_tokens,
        "tokens_per_second": round(stats.decode_rate, 2),
        "stop_reason": "interrupted" if stopped else stats.stop_reason,
        "repeats": stats.repeats,
        "prompt_tokens": stats.prompt_tokens,
        "prefill_seconds": round(stats.prefill_seconds, 4),
        "decode_seconds": round(stats.decode_seconds, 4),
        "drafted_tokens": stats.drafted_tokens,
        "accepted_tokens": stats.accepted_tokens,
        "model": session.model.checkpoint.source,
        "sampling": asdict(session.sampling),
    }
    ui.emit(answer)
    _say_cut(session, stopped)
    return INTERRUPTED if stopped else 0


def _talk(session: Session, asking: Asking) -> int:
    from optim.cli.conversation.commands import endings
    from optim.cli.conversation.repl import talk

    if not session.model.tokenizer.has_chat_template:
        fix = 'let it continue a text: optim run MODEL "TEXT"'
        raise OptimError("a model without a chat template cannot talk", fix, USAGE)
    chat = chats.Chat(session, asking.stats, asking.markdown)
    facts, drawn = session.info(), session.sampling.summary
    title = [session.model.checkpoint.name, facts["weights"], facts["device"], drawn]
    ui.note(" · ".join([*title, "/help, Ctrl-C stops a reply, Ctrl-D leaves"]))
    ui.notes.quiet = False  # what a slash command shows was asked for
    at_terminal = _at_terminal()
    complete = partial(endings, chat)
    talk(chat, editor(complete) if at_terminal else plain(sys.stdin.buffer))
    return 0
