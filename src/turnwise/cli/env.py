"""``turnwise env``: make, list, check, play and serve environments.

turnwise env new shop                              # a small one to start from, ready to be changed
turnwise env list                                  # what there is
turnwise env check shop.py:Shop                    # what would spoil a run
turnwise env play catch --arg rows=6 --teacher     # by hand
turnwise env serve catch --port 8000               # to others, over OpenEnv's protocol
turnwise env validate http://127.0.0.1:8000        # others' servers: protocol, seeds, sessions, leaks
turnwise env push shop --repo-id org/shop          # as a Hugging Face Space
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from turnwise.envs.session import EnvSpec

app = typer.Typer(help="Make, list, check, play and serve environments.", no_args_is_help=True)

Spec = Annotated[
    str,
    typer.Argument(
        help="An environment: catch, reasoning_gym:chain_sum, package.module:Class, path.py:Class.",
        metavar="SPEC",
    ),
]
SpecOrUrl = Annotated[
    str,
    typer.Argument(
        help="An environment: catch, reasoning_gym:chain_sum, package.module:Class, path.py:Class, or the "
        "address of a server: http://127.0.0.1:8000.",
        metavar="SPEC|URL",
    ),
]
Args = Annotated[
    list[str] | None,
    typer.Option("--arg", "-a", help="An argument of the environment, as KEY=VALUE; may be repeated."),
]


@app.command("new")
def new(
    name: Annotated[str, typer.Argument(help="Its name in snake_case, such as web_shop.")],
    directory: Annotated[Path, typer.Option("--dir", help="Where to write it.")] = Path("."),
    file: Annotated[
        bool, typer.Option("--file", help="One file and its test, without the package around them.")
    ] = False,
) -> None:
    """Write a small environment, ready to be changed: Turnwise trains on it, OpenEnv serves it."""
    from turnwise.cli.env_new import scaffold
    from turnwise.openenv.scaffold import lock

    written, class_name = scaffold(name, directory, package=not file)
    for path in written:
        typer.echo(f"wrote {path}")
    folder = written[0].parent
    problem = None if file else lock(folder)
    if problem is not None:
        typer.echo(f"\n{folder / 'uv.lock'} is missing, which `openenv validate` asks for: {problem}")
    elif not file:
        typer.echo(f"wrote {folder / 'uv.lock'}")
    typer.echo(f"\nnext:  turnwise env check {written[0]}:{class_name}")
    typer.echo(f"       turnwise env play {written[0]}:{class_name} --teacher")
    typer.echo(f"       pytest {written[1]}")
    if problem is not None:
        typer.echo(f"       uv lock --directory {folder}")
    if not file:
        typer.echo(f"       turnwise env validate {folder}")
        typer.echo(f"       turnwise env push {folder} --repo-id ORG/{name}")


@app.command("list")
def list_environments(
    source: Annotated[
        str | None, typer.Argument(help="List what is in it: reasoning_gym.", show_default=False)
    ] = None,
) -> None:
    """List the environments that come with Turnwise."""
    from turnwise.cli.env_list import show_datasets, show_library

    if source is None:
        show_library()
    else:
        show_datasets(source)


@app.command("check")
def check_environment(
    spec: SpecOrUrl,
    arg: Args = None,
    episodes: Annotated[int, typer.Option(help="Tasks of each split to play.", min=1)] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the scripted players.")] = 0,
) -> None:
    """Look for everything that would spoil a run; exit code 1 if there is an error."""
    from turnwise.cli.env_check import show
    from turnwise.envs.check import check

    report = asyncio.run(check(find(spec, arg), episodes=episodes, seed=seed))
    show(report)
    if not report.ok:
        raise typer.Exit(1)


@app.command("play")
def play_environment(
    spec: SpecOrUrl,
    arg: Args = None,
    split: Annotated[str, typer.Option(help="train or test.")] = "train",
    task: Annotated[int, typer.Option(help="Which row of the split, counted from 0.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the episode.")] = 0,
    teacher: Annotated[
        bool, typer.Option("--teacher", help="Show what the teacher would say; Enter says it.")
    ] = False,
) -> None:
    """Play one episode by hand, in the terminal or from piped lines."""
    from turnwise.cli.env_play import Game

    game = Game(find(spec, arg), show_teacher=teacher)
    try:
        asyncio.run(game.play(split=split, index=task, seed=seed))
    except KeyboardInterrupt:
        typer.echo("\nleft the game")


@app.command("serve")
def serve_environment(
    spec: Spec,
    arg: Args = None,
    host: Annotated[
        str, typer.Option(help="What it listens on; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Where it listens.", min=0, max=65535)] = 8000,
    max_sessions: Annotated[int, typer.Option(help="Live environments at once.", min=1)] = 1024,
    queue: Annotated[
        int, typer.Option(help="Clients that may wait for one when all are taken; 0 refuses.", min=0)
    ] = 1024,
    idle_timeout: Annotated[
        float, typer.Option(help="Seconds without a request that end a session; 0 keeps it.", min=0)
    ] = 1800.0,
    token: Annotated[
        str | None,
        typer.Option(
            help="What clients must bring as a bearer token; none asks for none. Made up and shown where "
            "other machines can connect; else read from TURNWISE_TOKEN."
        ),
    ] = None,
    origin: Annotated[
        list[str] | None,
        typer.Option(help="A web page's origin, beside its own, that may talk to it: https://play.example."),
    ] = None,
    mode: Annotated[
        Literal["simulation", "production"],
        typer.Option(help="production leaves agents their tools at /mcp, and nobody reset, step or state."),
    ] = "simulation",
) -> None:
    """Serve an environment to OpenEnv's clients and to Turnwise's, until Ctrl-C."""
    from turnwise.cli.env_serve import chosen_token, serve
    from turnwise.openenv.server.settings import Settings

    settings = Settings(
        max_sessions=max_sessions,
        queue=queue,
        idle_timeout=idle_timeout or None,
        token=chosen_token(host, token),
        origins=tuple(origin or ()),
        mode=mode,
    )
    serve(spec, args=parse_args(arg or []), host=host, port=port, token=token, settings=settings)


@app.command("push")
def push_environment(
    folder: Annotated[Path, typer.Argument(help="An OpenEnv package: where openenv.yaml is.")] = Path("."),
    repo_id: Annotated[
        str | None, typer.Option("--repo-id", "-r", help="ORG/NAME; yours and the environment's if not said.")
    ] = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new Space; else as your account has it.")
    ] = None,
    var: Annotated[
        list[str] | None, typer.Option("--var", "-e", help="A variable of the Space, KEY=VALUE.")
    ] = None,
    secret: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE, or KEY alone, which is read from the environment.")
    ] = None,
    hardware: Annotated[str | None, typer.Option(help="Of a new Space, such as t4-small.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="A pattern of what stays here.")] = None,
    pull_request: Annotated[bool, typer.Option("--pr", help="Propose it to a Space that is there.")] = False,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Of the commit.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be sent.")] = False,
) -> None:
    """Send an OpenEnv package to a Hugging Face Space, which builds and serves it."""
    from turnwise.cli.env_push import push_and_tell

    push_and_tell(
        folder,
        repo_id,
        private=private,
        variables=var,
        secrets=secret,
        hardware=hardware,
        exclude=exclude,
        pull_request=pull_request,
        message=message,
        dry_run=dry_run,
    )


@app.command("validate")
def validate_server(
    target: Annotated[str, typer.Argument(help="A server's URL, or an OpenEnv package's folder.")],
    sessions: Annotated[int, typer.Option(help="Sessions at once.", min=2)] = 8,
    seconds: Annotated[float, typer.Option(help="For each answer.", min=0.1)] = 10.0,
    token: Annotated[
        str | None,
        typer.Option(help="The bearer token of a server that asks for one.", envvar="TURNWISE_TOKEN"),
    ] = None,
    action: Annotated[
        str | None, typer.Option(help="An action that is always possible, as JSON; else one is sampled.")
    ] = None,
    python: Annotated[
        str | None, typer.Option(help="The interpreter that has a package's dependencies.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Look whether a server, whoever wrote it, is fit to train on; exit code 1 if there is an error.

    Its protocol, its seeds, its sessions at once and what they leave behind; `check` is for classes.
    """
    import json

    from turnwise.cli.env_validate import read_action, show, target_of
    from turnwise.openenv.validate import Options, validate

    options = Options(
        sessions=sessions, seconds=seconds, token=token, action=read_action(action), python=python
    )
    report = asyncio.run(validate(target_of(target), options))
    if as_json:
        typer.echo(json.dumps(report.as_json(), indent=2))
    else:
        show(report)
    if not report.ok:
        raise typer.Exit(1)


def find(spec: str, args: list[str] | None) -> EnvSpec:
    """The environment with its arguments.

    Raises:
        EnvSpecError: There is no such environment, or an argument is not ``key=value``.
    """
    from turnwise.envs.registry import make

    return make(spec, args=parse_args(args or []))


def parse_args(pairs: list[str]) -> dict[str, Any]:
    """``["rows=6", "wind=0.3"]`` as ``{"rows": 6, "wind": 0.3}``: values are YAML, as in recipes.

    Raises:
        EnvSpecError: Not ``key=value``, or the value is not YAML.
    """
    import yaml

    from turnwise.errors import EnvSpecError

    out: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise EnvSpecError(f"--arg {pair!r} is not KEY=VALUE, such as --arg rows=6")
        try:
            out[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise EnvSpecError(f"--arg {pair!r}: the value is not YAML: {error}") from error
    return out
