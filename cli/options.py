"""What a command is told beside its model: groups of flags, which several commands share.

A field is a flag (`cli/spread.py`); its default is what the command does without the flag.
"""

from dataclasses import dataclass, fields
from typing import Any, TypedDict

from optim.cli import flags


@dataclass(frozen=True, slots=True)
class Common:
    """Where to work, and how to tell the result."""

    device: flags.Device = "auto"
    threads: flags.Threads = None
    json: flags.Json = False
    quiet: flags.Quiet = False


class Given(TypedDict):
    """Arguments of a plan."""

    force: bool
    device: str
    threads: int | None
    trust_remote_code: bool


@dataclass(frozen=True, slots=True)
class How(Common):
    """How to make an artifact: what is not in its recipe."""

    print_recipe: flags.PrintRecipe = False
    dry_run: flags.DryRun = False
    no_eval: flags.NoEval = False
    force: flags.Force = False
    trust_remote_code: flags.TrustCode = False
    push: flags.Push = None
    yes: flags.Yes = False

    @property
    def given(self) -> Given:
        """What every plan takes beside its recipe."""
        return Given(
            force=self.force,
            device=self.device,
            threads=self.threads,
            trust_remote_code=self.trust_remote_code,
        )


@dataclass(frozen=True, slots=True)
class Running(Common):
    """How a model is run, by all commands that run one."""

    context: flags.Context = None
    kv_bits: flags.KvBits = 16
    kv_policy: flags.KvPolicy = "full"
    exact: flags.Exact = False
    offload: flags.Offload = False
    speculate: flags.Speculate = "auto"
    draft: flags.Draft = None


@dataclass(frozen=True, slots=True)
class Rows:
    """A file of prompts for `run`, and where the rows of answers go."""

    batch: flags.BatchFile = None
    batch_size: flags.BatchSize = 8
    output: flags.Rows = None


@dataclass(frozen=True, slots=True)
class Asking(Running):
    """How `run` asks a model, and shows what it says."""

    system: flags.System = ""
    raw: flags.Raw = False
    chat: flags.Chat = False
    stats: flags.Stats = False
    markdown: flags.Markdown = True


@dataclass(frozen=True, slots=True)
class Drawing:
    """How tokens are drawn; None leaves it to what the model's makers advise."""

    temperature: flags.Temperature = None
    top_k: flags.TopK = None
    top_p: flags.TopP = None
    min_p: flags.MinP = None
    repetition_penalty: flags.RepetitionPenalty = None
    seed: flags.SampleSeed = None
    max_tokens: flags.MaxTokens = None
    stop: flags.Stop = None

    @property
    def given(self) -> dict[str, Any]:
        """What was typed, as `Sampling` names it."""
        typed = {field.name: getattr(self, field.name) for field in fields(self)}
        given = {name: value for name, value in typed.items() if value is not None}
        return given | ({"stop": tuple(self.stop)} if self.stop else {})


AS_ADVISED = Drawing()


@dataclass(frozen=True, slots=True)
class Serving:
    """Who may ask a server, and how many at once."""

    host: flags.Host = "127.0.0.1"
    port: flags.Port = 8080
    name: flags.ServedName = None
    slots: flags.Slots = 4
    queue: flags.Queue = None
    queue_timeout: flags.QueueTimeout = 60.0
    grace: flags.Grace = 30.0
    kv_memory: flags.KvMemory = None
    send_timeout: flags.SendTimeout = 30.0
    api_key_file: flags.KeyFile = None
    no_key: flags.NoKey = False
    cors: flags.Cors = None


@dataclass(frozen=True, slots=True)
class Evaluating(Common):
    """What `eval` measures, on what, and what it does with the result."""

    against: flags.Against = None
    text: flags.Text = "builtin:eval"
    text_column: flags.TextColumn = "text"
    window: flags.Window = 1024
    max_windows: flags.MaxWindows = None
    max_ppl_increase: flags.MaxIncrease = None
    record: flags.Record = False
    tasks: flags.Tasks = None
    limit: flags.TaskLimit = None
    shots: flags.TaskShots = None


@dataclass(frozen=True, slots=True)
class Comparing(Common):
    """What `compare` measures, on what."""

    against: flags.Against = None
    text: flags.Text = "builtin:eval"
    window: flags.Window = 512
    max_windows: flags.FewWindows = 4
    no_speed: flags.NoSpeed = False
    plot: flags.Plot = None


@dataclass(frozen=True, slots=True)
class Timing(Running):
    """What `bench` measures. `prompt_tokens` as typed: `64,512`."""

    against: flags.Against = None
    peer: flags.Peer = None
    prompt_tokens: flags.PromptTokens = "64,512"
    new_tokens: flags.NewTokens = 64
    batch: flags.Batch = 1
    repeat: flags.Repeat = 3
    speculate: flags.Speculate = "off"
    serve: flags.ServeBench = False
    clients: flags.Clients = "1,4,16"


@dataclass(frozen=True, slots=True)
class Tuning:
    """How long `tune` trains, how fast, on what."""

    epochs: flags.Epochs = 3
    lr: flags.Rate = 1e-3
    calibration: flags.TuneText = "builtin:mixed"
    num_samples: flags.TuneSamples = 64
    seq_len: flags.TuneLength = 512
    seed: flags.TuneSeed = 0


@dataclass(frozen=True, slots=True)
class Planning:
    """The budget of a plan, how linears may be stored, the text it looks at, and what is told."""

    fit: flags.Fit = None
    bits: flags.AverageBits = None
    max_kl: flags.MaxKl = None
    device: flags.DeviceMemory = None
    context: flags.PlanContext = 4096
    method: flags.PlanMethod = "awq"
    group_size: flags.PlanGroup = None
    sym: flags.PlanSym = False
    widths: flags.Widths = "2,3,4,8"
    apart: flags.PlanApart = False
    lossless: flags.PlanLossless = False
    calibration: flags.TuneText = "builtin:mixed"
    num_samples: flags.TuneSamples = 64
    seq_len: flags.TuneLength = 512
    seed: flags.TuneSeed = 0
    plot: flags.Plot = None
    force: flags.Force = False
    threads: flags.Threads = None
    json: flags.Json = False
    quiet: flags.Quiet = False
