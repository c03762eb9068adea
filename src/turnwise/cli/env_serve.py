"""What ``turnwise env serve`` does: an environment on a port, for OpenEnv's clients and Turnwise's."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from socket import socket

import typer
import uvicorn

from turnwise.envs.registry import named, unsigned
from turnwise.errors import EnvSpecError
from turnwise.openenv.hosted import hosted
from turnwise.openenv.served import Served
from turnwise.openenv.server.access import loopback
from turnwise.openenv.server.app import create_server_app, uvicorn_config
from turnwise.openenv.server.settings import TOKEN, Settings, asked_for
from turnwise.openenv.typed import TypedEnv
from turnwise.openenv.typed_class import written_for_openenv


def chosen_token(host: str, given: str | None) -> str | None:
    """The token to ask for: as given, of the environment, or a new one where other machines can connect.

    Args:
        host: What the server listens on.
        given: ``none`` asks for none, wherever it listens.
    """
    if not (given or os.environ.get(TOKEN) or loopback(host)):
        return secrets.token_urlsafe(24)
    return asked_for(given)


def served_as(spec: str, args: Mapping[str, object], settings: Settings) -> Served:
    """An environment of ours by any name that recipes take, or a class written for OpenEnv.

    Raises:
        EnvSpecError: There is no such environment, or it is a server already.
    """
    if spec.startswith(("http://", "https://", "ws://", "wss://")):
        spec = unsigned(spec)
        raise EnvSpecError(
            f"{spec} is a server already, and is played on where it is: `env: {spec}` in a recipe, "
            f"`turnwise env play {spec}`, or `turnwise env validate {spec}`"
        )
    found = named(spec)
    if not written_for_openenv(found):
        return hosted(spec, args=args)
    return TypedEnv.of(found, args, mode=settings.mode)


def serve(
    spec: str, *, args: dict[str, object], host: str, port: int, token: str | None, settings: Settings
) -> None:
    """Serve until Ctrl-C.

    Raises:
        EnvSpecError: There is no such environment.
        EnvError: It cannot be made.
        SystemExit: The port is taken, or there is no such host.
    """

    def listening(port: int) -> None:
        where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        page = f"page {where}/web" if settings.mode == "simulation" else f"agents connect to {where}/mcp"
        typer.echo(f"serving {spec} at {where}  ({page}, API {where}/docs)")
        if settings.token is not None and token is None and not os.environ.get(TOKEN):
            typer.echo(f"token {settings.token}  (--token sets one, --token none lets everybody in)")

    served = served_as(spec, args, settings)
    app = create_server_app(served, settings=settings)
    Server(uvicorn_config(app, host=host, port=port, log_level="warning"), served, listening).run()


class Server(uvicorn.Server):
    """One that makes an environment before it listens, since who cannot make one has nothing to serve.

    Args:
        config: Of `uvicorn_config`.
        served: What it hosts.
        listening: Called with the port once it does.
    """

    def __init__(self, config: uvicorn.Config, served: Served, listening: Callable[[int], None]) -> None:
        super().__init__(config)
        self._served, self._listening = served, listening

    async def serve(self, sockets: list[socket] | None = None) -> None:
        """As uvicorn does, after that.

        Raises:
            EnvError: It cannot be made.
        """
        await self._served.metadata()
        await super().serve(sockets)

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        if self.started:
            self._listening(self.servers[0].sockets[0].getsockname()[1])
