"""Not a test: `optim run` with slow, known answers, for the terminal tests to drive."""

import sys
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import optim.cli.options
import optim.cli.run


@dataclass(frozen=True)
class Sampling:
    """As small as a parameter set can be: the real one would import torch for each test."""

    temperature: float = 0.0
    summary = "greedy"


@dataclass
class Stats:
    prompt_tokens: int = 0
    new_tokens: int = 0
    decode_rate: float = 20.0
    stop_reason: str = "stop"
    repeats: bool = False
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class SlowSession:
    """Answers "0 1 2 …", a number every 50 ms; a message "echo X" gets X back."""

    def __init__(self) -> None:
        self.model = SimpleNamespace(
            checkpoint=SimpleNamespace(name="slow", source="slow"),
            tokenizer=SimpleNamespace(has_chat_template=True),
        )
        self.system, self.messages = "", list[dict[str, str]]()
        self.sampling, self.stats = Sampling(), Stats()

    def reply(self, text: str, reading: object = None) -> Generator[str, None, None]:
        echo = text.removeprefix("echo ") if text.startswith("echo ") else ""
        self.messages = [*self.messages, {"role": "user", "content": text}]
        said: list[str] = []
        try:
            for number in range(1 if echo else 400):
                said.append(echo or f"{number} ")
                yield said[-1]
                time.sleep(0.05)
        finally:
            self.messages = [*self.messages, {"role": "assistant", "content": "".join(said)}]
            self.stats = Stats(prompt_tokens=1, new_tokens=len(said))

    def save_cache(self, path: Path) -> int:
        """It keeps no cache, so there is none to save."""
        return 0

    def load_cache(self, path: Path) -> str:
        """Why there is no cache to go on from."""
        return "there is no cache"

    def info(self) -> dict[str, str]:
        return {"weights": "none", "device": "cpu"}


optim.cli.run._open = lambda *_: SlowSession()  # type: ignore[assignment]
sys.exit(optim.cli.run.run("slow", None, optim.cli.options.Asking()))
