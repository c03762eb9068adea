"""``turnwise env push``: a package to a Hugging Face Space."""

from __future__ import annotations

import os
from pathlib import Path

import typer

from turnwise.errors import EnvSpecError


def pairs(given: list[str] | None, *, option: str, from_environment: bool = False) -> dict[str, str]:
    """``["A=1"]`` as ``{"A": "1"}``; with ``from_environment`` a bare ``A`` is taken from there.

    Raises:
        EnvSpecError: Not KEY=VALUE. The message does not repeat what may be a secret.
    """
    out = {}
    for number, pair in enumerate(given or [], 1):
        key, equals, value = pair.partition("=")
        if not equals and from_environment and key in os.environ:
            value, equals = os.environ[key], "="
        if not equals or not key:
            bare = "; a bare KEY is read from the environment, which has none of that name"
            raise EnvSpecError(f"{option} number {number} is not KEY=VALUE{bare if from_environment else ''}")
        out[key] = value
    return out


def push_and_tell(
    folder: Path,
    repo_id: str | None,
    *,
    private: bool | None,
    variables: list[str] | None,
    secrets: list[str] | None,
    hardware: str | None,
    exclude: list[str] | None,
    pull_request: bool,
    message: str | None,
    dry_run: bool,
) -> None:
    """Push, and say where it is.

    Raises:
        EnvSpecError, PushError: As for `turnwise.openenv.push.push`.
    """
    from turnwise.openenv.push import files, package, push

    settings = pairs(variables, option="--var")
    hidden = pairs(secrets, option="--secret", from_environment=True)
    if dry_run:
        found = package(folder)
        owner, _, name = (repo_id or found.name).rpartition("/")
        typer.echo(f"Space {owner or 'YOUR-NAME'}/{name}")
        for inside in files(folder, exclude or []):
            typer.echo(inside)
        declared = {} if pull_request else found.variables
        for key in {**declared, **settings}:
            typer.echo(f"variable {key}, of {'--var' if key in settings else 'openenv.yaml'}")
        for key in hidden:
            typer.echo(f"secret {key}, of --secret")
        return
    pushed = push(
        folder,
        repo_id,
        private=private,
        variables=settings,
        secrets=hidden,
        hardware=hardware,
        exclude=exclude or [],
        pull_request=pull_request,
        message=message,
    )
    typer.echo(f"{len(pushed.files)} files to {pushed.repo_id}: {pushed.url}")
    if not pull_request:
        typer.echo(f"next:  turnwise env validate {pushed.url}    # when it is built")
