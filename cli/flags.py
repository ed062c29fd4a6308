"""The flags of the commands, each spelled once; a flag that is not given is None."""

from typing import Annotated

from typer import Argument, Option

from optim.cli.defaults import model as named

# What every command shares.
Model = Annotated[
    str,
    Argument(metavar="MODEL", callback=named, help="A folder, a .gguf file, a hub id, or `demo`."),
]
Json = Annotated[bool, Option("--json", help="Print one JSON document instead of tables.")]
Quiet = Annotated[bool, Option("--quiet", help="No progress and no notes; errors still show.")]
Device = Annotated[str, Option("--device", help="auto, cpu or cuda.")]
Exact = Annotated[
    bool, Option("--exact", help="Packed weights: sums as the plain model has them, bit for bit.")
]
Offload = Annotated[
    bool, Option("--offload", help="Blocks stay in the host's memory, and come as they are needed.")
]
Threads = Annotated[int | None, Option("--threads", min=1, help="CPU threads.")]
TrustCode = Annotated[
    bool, Option("--trust-remote-code", help="Run Python code that comes with the model.")
]

# quantize, prune, pack: what is no key of a section (those are made from the schema).
RecipeModel = Annotated[
    str | None,
    Argument(
        metavar="MODEL",
        callback=named,
        help="A folder, a .gguf file, a hub id, `demo`; or the recipe's.",
    ),
]
QuantizeOutput = Annotated[
    str | None, Option("-o", "--output", help="Folder to write. Default: ./MODEL-METHOD-FORMAT.")
]
Recipe = Annotated[
    str | None, Option("--recipe", help="A file or a built-in name; flags go over it.")
]
Sets = Annotated[
    list[str] | None, Option("--set", metavar="KEY=VALUE", help="Any recipe key, as the last word.")
]
PrintRecipe = Annotated[bool, Option("--print-recipe", help="Print the whole recipe and stop.")]
DryRun = Annotated[bool, Option("--dry-run", help="Check everything, print the plan and stop.")]
NoEval = Annotated[
    bool,
    Option("--no-eval", help="Do not measure what the result cost, nor keep seconds and memory."),
]
Force = Annotated[bool, Option("--force", help="Replace an output folder that optim made.")]

PruneOutput = Annotated[
    str | None, Option("-o", "--output", help="Folder to write. Default: ./MODEL-METHOD.")
]

PackOutput = Annotated[
    str | None, Option("-o", "--output", help="Folder to write. Default: ./MODEL-LAYOUT.")
]
Packed = Annotated[
    str, Argument(metavar="MODEL", callback=named, help="A packed folder, or a hub id of one.")
]
Tunable = Annotated[
    str, Argument(metavar="ARTIFACT", callback=named, help="A packed folder: integers and scales.")
]
Original = Annotated[
    str,
    Option(
        "--against",
        metavar="BASE",
        callback=named,
        help="The original model, whose outputs are wanted.",
    ),
]
TuneOutput = Annotated[
    str | None, Option("-o", "--output", help="Folder to write. Default: ARTIFACT-tuned.")
]
Epochs = Annotated[int, Option("--epochs", help="Passes over the text; it may end earlier.")]
Rate = Annotated[float, Option("--lr", help="Highest relative step of a scale.")]
TuneText = Annotated[
    str, Option("--calibration", metavar="SPEC", help="builtin:NAME, a file or folder, a hub id.")
]
TuneSamples = Annotated[int, Option("--num-samples", help="Windows of text.")]
TuneLength = Annotated[int, Option("--seq-len", help="Tokens of a window.")]
TuneSeed = Annotated[int, Option("--seed", help="Seed of the windows and of their order.")]
Fit = Annotated[str | None, Option("--fit", metavar="SIZE", help="Bytes of the weights: 6GB.")]
AverageBits = Annotated[
    float | None, Option("--bits", min=1, max=16, help="Bits a weight of the blocks, scales too.")
]
MaxKl = Annotated[float | None, Option("--max-kl", min=0, help="Divergence, nats a token.")]
DeviceMemory = Annotated[
    str | None,
    Option("--device", metavar="SIZE", help="Memory for weights and for --context tokens: 24GB."),
]
PlanContext = Annotated[int, Option("--context", min=1, help="Tokens that --device has room for.")]
PlanMethod = Annotated[str, Option("-m", "--method", help="awq, gptq or rtn, for the recipe.")]
PlanGroup = Annotated[
    int | None, Option("-g", "--group-size", help="Default: the largest that fits all linears.")
]
PlanSym = Annotated[
    bool, Option("--sym/--asym", help="Without zero points: mixed widths that transformers loads.")
]
Widths = Annotated[str, Option("--widths", help="Bits that linears may get.")]
PlanApart = Annotated[
    bool, Option("--apart", help="q, k, v, gate, up each have their own width; vLLM loads no such.")
]
PlanLossless = Annotated[
    bool, Option("--lossless", help="What stays 16 bits is packed in 12; only optim reads that.")
]
PlanOutput = Annotated[
    str | None, Option("-o", "--output", help="Recipe to write. Default: ./MODEL-plan.yaml.")
]
UnpackOutput = Annotated[str | None, Option("-o", "--output", help="Folder to write.")]

Applied = Annotated[str, Argument(metavar="RECIPE", help="A file or a built-in name.")]
ApplyOutput = Annotated[
    str | None, Option("-o", "--output", help="Folder to write. Default: ./MODEL-RECIPE.")
]
KeepSteps = Annotated[
    bool, Option("--keep-steps", help="Keep what lies in between, in OUTPUT.steps.")
]
ExportOutput = Annotated[
    str | None, Option("-o", "--output", help="What to write. Default: ./MODEL and the format.")
]

# run: sampling.
SAMPLING = "Sampling"
Prompt = Annotated[
    str | None, Argument(metavar="PROMPT", help="Answer this once; `-` reads standard input.")
]
System = Annotated[str, Option("--system", help="System prompt.")]
Raw = Annotated[bool, Option("--raw", help="Continue the prompt; no chat template.")]
Chat = Annotated[bool, Option("--chat", help="A conversation even if input is piped.")]
Stats = Annotated[bool, Option("--stats", help="Show speed after each reply.")]
Markdown = Annotated[
    bool, Option("--markdown/--no-markdown", help="At a terminal: bold headings, coloured code.")
]
Context = Annotated[int | None, Option("--context", min=1, help="Tokens kept. Default: model's.")]
BatchFile = Annotated[
    str | None, Option("--batch", metavar="FILE", help="Answer a file of JSON lines; - is a pipe.")
]
BatchSize = Annotated[int, Option("--batch-size", min=1, help="Prompts of a --batch at once.")]
Rows = Annotated[
    str | None, Option("-o", "--output", metavar="FILE", help="Where a --batch's rows go.")
]
KvBits = Annotated[int, Option("--kv-bits", help="Bits of the KV cache: 16, 8 or 4.")]
KvPolicy = Annotated[
    str, Option("--kv-policy", help="full; or stream: first and latest tokens, without an end.")
]
Speculate = Annotated[
    str,
    Option(
        "--speculate",
        help="Guess tokens ahead, same text: auto (where it pays), lookup (always) or off.",
    ),
]
Draft = Annotated[
    str | None,
    Option(
        "--draft",
        metavar="ARTIFACT",
        callback=named,
        help="A smaller artifact of the same model, which guesses tokens ahead.",
    ),
]
Temperature = Annotated[
    float | None,
    Option(
        "--temperature",
        help="0 is greedy. Default: the model's own, else 0.7.",
        rich_help_panel=SAMPLING,
    ),
]
TopK = Annotated[
    int | None,
    Option("--top-k", help="0 is off. Default: the model's, else 40.", rich_help_panel=SAMPLING),
]
TopP = Annotated[
    float | None,
    Option("--top-p", help="1 is off. Default: the model's, else 0.95.", rich_help_panel=SAMPLING),
]
MinP = Annotated[
    float | None,
    Option("--min-p", help="0 is off. Default: the model's, else 0.05.", rich_help_panel=SAMPLING),
]
RepetitionPenalty = Annotated[
    float | None,
    Option(
        "--repetition-penalty",
        help="1 is off. Default: the model's, else 1.",
        rich_help_panel=SAMPLING,
    ),
]
SampleSeed = Annotated[
    int | None, Option("--seed", help="Same seed, same reply.", rich_help_panel=SAMPLING)
]
MaxTokens = Annotated[
    int | None,
    Option(
        "--max-tokens",
        min=1,
        help="Longest reply. Default: what fits the context.",
        rich_help_panel=SAMPLING,
    ),
]
Stop = Annotated[
    list[str] | None, Option("--stop", help="Text that ends a reply.", rich_help_panel=SAMPLING)
]

Levels = Annotated[
    bool, Option("--levels", help="Prove the paths at each level of instructions too: minutes.")
]
Revision = Annotated[str | None, Option("--revision", help="A branch, tag or commit of the hub.")]

# inspect, eval, bench.
Verify = Annotated[bool, Option("--verify", help="Hash the files; exit 3 if one has changed.")]
Against = Annotated[
    str | None, Option("--against", metavar="BASE", callback=named, help="The original model.")
]
Tensors = Annotated[bool, Option("--tensors", help="List packed tensors beside the entropy limit.")]
Text = Annotated[
    str, Option("--text", metavar="SPEC", help="builtin:NAME, a file or folder, or a hub id.")
]
TextColumn = Annotated[
    str, Option("--text-column", metavar="NAME", help="Column that holds the text.")
]
Window = Annotated[int, Option("--window", min=2, help="Tokens a window.")]
MaxWindows = Annotated[int | None, Option("--max-windows", min=1, help="Default: all.")]
Tasks = Annotated[
    str | None,
    Option("--tasks", help="Ask these tasks of lm-eval instead: hellaswag,arc_easy, or FILE.yaml."),
]
TaskLimit = Annotated[int | None, Option("--limit", min=1, help="Questions of each of --tasks.")]
TaskShots = Annotated[int | None, Option("--shots", min=0, help="Examples before each question.")]
Push = Annotated[
    str | None,
    Option("--push", metavar="REPO", help="Send the result to OWNER/NAME of the hub; asks first."),
]
Pushed = Annotated[str, Argument(metavar="ARTIFACT", help="A folder of optim, or a .gguf file.")]
Repo = Annotated[str, Argument(metavar="REPO", help="OWNER/NAME; made, private, if not there.")]
Yes = Annotated[bool, Option("--yes", help="Do not ask before --push sends anything.")]
FewWindows = Annotated[int, Option("--max-windows", min=1, help="Windows measured.")]
Models = Annotated[
    list[str],
    Argument(
        metavar="MODEL...", callback=named, help="Models of one vocabulary; the first is the base."
    ),
]
NoSpeed = Annotated[bool, Option("--no-speed", help="Do not measure how fast each decodes.")]
Plot = Annotated[
    str | None, Option("--plot", metavar="FILE.png", help="Draw size and KL; needs matplotlib.")
]
Record = Annotated[
    bool, Option("--record", help="Keep the result in the artifact's manifest and model card.")
]
MaxIncrease = Annotated[
    float | None,
    Option("--max-ppl-increase", min=0, help="Exit 3 beyond it; 0.02 is 2 % over --against."),
]
Peer = Annotated[
    list[str] | None, Option("--peer", help="Another engine: transformers or llama.cpp.")
]
PromptTokens = Annotated[str, Option("--prompt-tokens", help="Prompt lengths, like 64,512.")]
NewTokens = Annotated[int, Option("--new-tokens", min=2, help="Tokens decoded a round.")]
ServeBench = Annotated[
    bool, Option("--serve", help="Measure a server of it, beside llama.cpp's with --peer.")
]
Clients = Annotated[str, Option("--clients", help="With --serve: clients at once, like 1,4,16.")]
Batch = Annotated[int, Option("--batch", min=1, help="Sequences at once.")]
Repeat = Annotated[int, Option("--repeat", min=1, help="Rounds after the warm-up.")]

# serve
Host = Annotated[
    str, Option("--host", help="Address to listen on; beyond this machine with a key.")
]
Port = Annotated[int, Option("--port", min=0, max=65535, help="0 takes a free one.")]
ServedName = Annotated[str | None, Option("--name", help="What clients call the model.")]
Slots = Annotated[int, Option("--slots", min=1, max=64, help="Texts that are written at once.")]
Queue = Annotated[
    int | None, Option("--queue", min=0, help="Texts that may wait. Default: 4 a slot.")
]
QueueTimeout = Annotated[float, Option("--queue-timeout", min=0, help="Seconds a text may wait.")]
Grace = Annotated[float, Option("--grace", min=0, help="Seconds to finish texts when stopped.")]
KvMemory = Annotated[int | None, Option("--kv-memory", min=1, help="MiB of all KV caches at most.")]
KeyFile = Annotated[
    str | None,
    Option("--api-key-file", metavar="FILE", help="The key clients need; or OPTIM_API_KEY."),
]
Cors = Annotated[
    list[str] | None,
    Option("--cors", metavar="ORIGIN", help="A site whose pages may ask, like https://a.example."),
]
SendTimeout = Annotated[
    float, Option("--send-timeout", min=0.1, help="Seconds a client may leave its answer unread.")
]
NoKey = Annotated[bool, Option("--no-key", help="Listen beyond this machine without a key.")]
