"""The commands that run a model. Each reads its flags and calls one function of `cli/`."""

import typer

from optim.cli import flags

app = typer.Typer()


@app.command(
    rich_help_panel="Run", epilog='Example: optim run smollm2-awq "What is the capital of France?"'
)
def run(
    model: flags.Model,
    prompt: flags.Prompt = None,
    system: flags.System = "",
    raw: flags.Raw = False,
    chat: flags.Chat = False,
    quiet: flags.Quiet = False,
    stats: flags.Stats = False,
    batch: flags.BatchFile = None,
    batch_size: flags.BatchSize = 8,
    output: flags.Rows = None,
    context: flags.Context = None,
    kv_bits: flags.KvBits = 16,
    kv_policy: flags.KvPolicy = "full",
    exact: flags.Exact = False,
    offload: flags.Offload = False,
    speculate: flags.Speculate = "auto",
    device: flags.Device = "auto",
    threads: flags.Threads = None,
    json: flags.Json = False,
    temperature: flags.Temperature = None,
    top_k: flags.TopK = None,
    top_p: flags.TopP = None,
    min_p: flags.MinP = None,
    repetition_penalty: flags.RepetitionPenalty = None,
    seed: flags.SampleSeed = None,
    max_tokens: flags.MaxTokens = None,
    stop: flags.Stop = None,
) -> None:
    """Chat with a model, answer one prompt, or a file of them."""
    from optim.cli import run as command

    sampling = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "max_tokens": max_tokens,
        "stop": tuple(stop) if stop else None,
    }
    given = {key: value for key, value in sampling.items() if value is not None}
    options = command.RunOptions(
        *(system, raw, quiet, chat, stats, json, context, kv_bits, kv_policy, threads, device),
        *(exact, offload, given, speculate),
    )
    if batch is None:
        raise typer.Exit(command.run(model, prompt, options))
    raise typer.Exit(command.run_file(model, batch, prompt, options, output, batch_size))
