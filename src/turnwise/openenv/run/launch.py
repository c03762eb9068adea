"""Start a server for a client: what `EnvClient` is constructed with, or nothing left running."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, TypedDict

from turnwise.errors import EnvSpecError, boundary
from turnwise.openenv.run.docker import LocalDockerProvider
from turnwise.openenv.run.provider import ContainerProvider, Provider, RuntimeProvider, stop
from turnwise.openenv.run.ready import StartError
from turnwise.openenv.run.space import SpaceProvider, named

SPACE_PLATFORM = "linux/amd64"
"""What images of Spaces are built for."""


class Launched(TypedDict):
    """A server that is ready, and what runs it."""

    base_url: str
    provider: Provider


async def run_image(
    image: str, provider: ContainerProvider | None, seconds: float, start: Mapping[str, Any]
) -> Launched:
    """Run a Docker image.

    Raises:
        StartError: It was not ready after ``seconds``, or could not be started.
    """
    chosen = LocalDockerProvider() if provider is None else provider

    def run() -> str:
        url = chosen.start_container(image, **start)
        chosen.wait_for_ready(url, timeout_s=seconds)
        return url

    return await launched(chosen, run)


async def run_space_image(
    repo_id: str, provider: Provider | None, seconds: float, options: Mapping[str, Any]
) -> Launched:
    """Run a Space's image, from the registry of Spaces.

    Raises:
        EnvSpecError: No ``org/name``, or no provider for images.
        StartError: As for `run_image`.
    """
    if provider is not None and not isinstance(provider, ContainerProvider):
        raise EnvSpecError("use_docker=True takes a provider that has start_container()")
    named(repo_id)
    start = dict(options)
    image = f"registry.hf.space/{repo_id.lower().replace('/', '-')}:{start.pop('tag', 'latest')}"
    if provider is None:
        start.setdefault("platform", SPACE_PLATFORM)
    return await run_image(image, provider, seconds, start)


async def run_space_here(
    repo_id: str, provider: Provider | None, seconds: float, options: Mapping[str, Any]
) -> Launched:
    """Download a Space and run it in a virtual environment of its own.

    Raises:
        EnvSpecError: No ``org/name``, no provider for processes, or options that it would not see.
        StartError: It was not ready after ``seconds``, or could not be installed or started.
    """
    start = {name: value for name, value in options.items() if name in ("port", "env_vars", "workers")}
    rest = {name: value for name, value in options.items() if name not in start}
    if provider is None:
        provider = SpaceProvider(None if "project_path" in rest else repo_id, **rest)
    elif not isinstance(provider, RuntimeProvider):
        raise EnvSpecError("use_docker=False takes a provider that has start()")
    elif rest:
        raise EnvSpecError(f"{', '.join(rest)}: the provider was made already; give them to it instead")
    chosen = provider

    def run() -> str:
        url = chosen.start(**start)
        chosen.wait_for_ready(timeout_s=seconds)
        return url

    return await launched(chosen, run)


async def launched(provider: Provider, run: Callable[[], str]) -> Launched:
    """What ``run`` started, which is stopped if anything goes wrong with it."""
    try:
        return Launched(base_url=await asyncio.to_thread(run), provider=provider)
    except BaseException as error:  # a cancellation too: the thread goes on until what it started is stopped
        try:
            with boundary(StartError, "and it could not be stopped"):
                await asyncio.shield(asyncio.to_thread(stop, provider))
        except StartError as second:  # the first one is why
            error.add_note(str(second))
        raise
