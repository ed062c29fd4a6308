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
    draft: flags.Draft = None,
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
        *(exact, offload, given, speculate, draft),
    )
    if batch is None:
        raise typer.Exit(command.run(model, prompt, options))
    raise typer.Exit(command.run_file(model, batch, prompt, options, output, batch_size))


@app.command(rich_help_panel="Run", epilog="Example: optim serve smollm2-awq --port 8080")
def serve(
    model: flags.Model,
    host: flags.Host = "127.0.0.1",
    port: flags.Port = 8080,
    name: flags.ServedName = None,
    slots: flags.Slots = 4,
    queue: flags.Queue = None,
    queue_timeout: flags.QueueTimeout = 60.0,
    grace: flags.Grace = 30.0,
    context: flags.Context = None,
    kv_bits: flags.KvBits = 16,
    kv_memory: flags.KvMemory = None,
    speculate: flags.Speculate = "auto",
    api_key_file: flags.KeyFile = None,
    no_key: flags.NoKey = False,
    exact: flags.Exact = False,
    device: flags.Device = "auto",
    threads: flags.Threads = None,
    quiet: flags.Quiet = False,
    json: flags.Json = False,
) -> None:
    """Answer OpenAI's API, and show a chat page, for other programs and people."""
    from optim.cli.run import RunOptions
    from optim.cli.serve import command

    options = command.ServeOptions(
        *(host, port, name, slots, queue, queue_timeout, grace, kv_memory, api_key_file, no_key)
    )
    running = RunOptions(
        context=context, kv_bits=kv_bits, threads=threads, device=device, exact=exact,
        quiet=quiet, as_json=json, speculate=speculate,
    )  # fmt: skip
    raise typer.Exit(command.serve(model, options, running))
