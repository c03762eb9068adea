"""``turnwise vllm``: vLLM servers in an environment of their own, with everything that a run asks of them."""

from __future__ import annotations

import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Start and end vLLM servers that runs sample from.", no_args_is_help=True)


@app.command("up")
def up(
    model: Annotated[str, typer.Argument(help="What to serve: a Hub name or a directory.")],
    flags: Annotated[
        list[str] | None, typer.Argument(help="After --: flags for vLLM, such as --max-model-len 8192.")
    ] = None,
    port: Annotated[int, typer.Option(help="Where it listens.")] = 8000,
    host: Annotated[
        str, typer.Option(help="What it listens on; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    tensor_parallel_size: Annotated[int, typer.Option(help="GPUs that share the model.")] = 1,
    lora_rank: Annotated[
        int | None, typer.Option(help="Take LoRA adapters up to this rank: for runs with model.lora.")
    ] = None,
    nccl: Annotated[
        bool, typer.Option("--nccl", help="New weights come from GPU to GPU: for engine.weights=nccl.")
    ] = False,
    version: Annotated[str, typer.Option(help="Of vLLM.")] = "0.32.0",
    venv: Annotated[
        Path | None, typer.Option(help="Its environment; ~/.cache/turnwise/vllm-VERSION if not given.")
    ] = None,
    python: Annotated[
        Path | None,
        typer.Option(help="Interpreter for a new environment; the one that runs this if not given."),
    ] = None,
    seconds: Annotated[float, typer.Option(help="How long it may take to start.")] = 900.0,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return when it is up; end it with `down`.")
    ] = False,
) -> None:
    """Install vLLM into its own environment, unless it is there, and serve a model until Ctrl-C.

    Its pins never meet Turnwise's: the two speak HTTP.
    """
    from turnwise.cli.vllm_install import has_gpu, install
    from turnwise.cli.vllm_process import Plan, start

    # Whoever ends this process ends the server with it.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    environment = install(version, venv=venv, python=python, tell=typer.echo)
    plan = Plan(
        model=model,
        host=host,
        port=port,
        tensor_parallel_size=tensor_parallel_size,
        lora_rank=lora_rank,
        nccl=nccl,
        cpu=not has_gpu(),
        flags=tuple(flags or ()),
    )
    server = start(environment, plan, seconds=seconds, tell=typer.echo)
    lora = "" if lora_rank is None else f" model.lora.r={lora_rank}"
    typer.echo(
        f"\n{model} is served at {server.url} (process {server.pid}, log {server.log}).\n\n"
        f"engine:\n  kind: vllm\n  urls: [{server.url}]\n\n"
        f"or: turnwise run RECIPE engine.kind=vllm {shlex.quote(f'engine.urls=[{server.url}]')}"
        f" model.name={shlex.quote(model)}{lora}\n"
    )
    if detach:
        typer.echo(f"End it with: turnwise vllm down --port {port}")
        return
    code = server.wait()
    if code:
        typer.secho(server.last_words(), err=True)
    sys.exit(code)


@app.command("down")
def down(
    port: Annotated[
        int | None, typer.Option(help="Of the server to end; all that `up` started if not given.")
    ] = None,
) -> None:
    """End servers that `up` started, by their process ids."""
    from turnwise.cli.vllm_process import running

    ended = [server for server in running() if port is None or server.port == port]
    for server in ended:
        server.stop()
        typer.echo(f"{server.url} ({server.model}, process {server.pid}) is down")
    if not ended:
        there = ", ".join(server.url for server in running()) or "none"
        typer.echo(f"nothing to end; servers that `turnwise vllm up` started: {there}")


@app.command("free")
def free(url: Annotated[str, typer.Argument(help="http://127.0.0.1:8000")]) -> None:
    """Take a server away from runs that were killed: their lease ends and their adapters are unloaded."""
    import asyncio

    from turnwise.engines.vllm_tenancy import evict

    for line in asyncio.run(evict(url)):
        typer.echo(line)
