"""`Settings`: what whoever runs a server decides."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

TOKEN = "TURNWISE_TOKEN"
"""The variable that a server's token is read from where nobody says it: not all should stand in a command."""


def asked_for(given: str | None = None) -> str | None:
    """The token of a server: ``given``, else what `TOKEN` holds; None if that is nothing, or ``none``."""
    token = given or os.environ.get(TOKEN)
    return None if token in (None, "", "none") else token


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Of one server; the environment is a `turnwise.openenv.served.Served`."""

    max_sessions: int = 1024
    """Live environments at once; the environment's own bound holds too."""
    queue: int = 1024
    """Clients that may wait for a session when all are taken; more are refused. 0 refuses at once."""
    queue_seconds: float = 50.0
    """How long one may wait: less than the 60 s after which OpenEnv's clients give up."""
    idle_timeout: float | None = 1800.0
    """Seconds without a request after which a session is closed, its socket with it; None keeps it."""
    ping_interval: float = 20.0
    """Seconds between pings. Whose peer answers none within as many is closed: it was half open."""
    token: str | None = None
    """What clients must bring as ``Authorization: Bearer …``; None asks for none."""
    origins: tuple[str, ...] = ()
    """Origins of web pages, beside the server's own, that may talk to it; ``*`` is any."""
    max_frame: int = 16 << 20
    """Bytes of one frame or body from a client."""
    rate: float | None = None
    """Requests a second of one session, over which it is slowed down; None sets no bound."""
    max_ahead: int = 64
    """Requests of one session that may wait for the one before them."""
    mode: Literal["simulation", "production"] = "simulation"
    """Whether episodes are controlled from outside; in production agents have their tools alone."""
