"""`Options`: what ``args`` of an environment that is a server may say."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from typing import Any

from pydantic import Field, ValidationError

from turnwise.config import Section
from turnwise.errors import EnvSpecError


class Options(Section):
    """How a server is played on; given as ``args`` in a recipe, by keyword to `turnwise.connect`."""

    reset: dict[str, Any] = Field({})
    """Sent with every reset, beside the seed and what the task's row holds."""
    show: str | list[str] = Field([])
    """Fields of the observation to show, in this order; whatever holds something where it is not set."""
    cumulative: bool = False
    """Each observation repeats the ones before it: show what is new."""
    reply: str | None = None
    """The action's field that a reply's text goes into: the policy then talks and has no tools."""
    system: str | None = None
    """A system message; a Turnwise server brings its own."""
    forfeit: float | None = None
    """What an end is worth that could not be scored; 0 or what a Turnwise server says if not set."""
    token: str | None = None
    """Bearer token; ``$NAME`` is read from the environment variable, so that no recipe holds a secret."""
    headers: dict[str, str] = Field({})
    """More headers of every request; ``$NAME`` in a value is read from the environment variable too."""
    patience: float = Field(60.0, gt=0)
    """Seconds to go on trying while no server answers. A place on a full one is waited for without
    bound, save to find out what it offers."""

    @property
    def shown(self) -> tuple[str, ...]:
        """The fields of ``show``."""
        return (self.show,) if isinstance(self.show, str) else tuple(self.show)

    @property
    def request_headers(self) -> dict[str, str]:
        """The headers, the token's among them.

        Raises:
            EnvSpecError: A variable that ``token`` or one of ``headers`` names is not set.
        """
        headers = {name: _filled(value, f"headers.{name}") for name, value in self.headers.items()}
        if self.token:
            headers["Authorization"] = f"Bearer {_filled(self.token, 'token')}"
        return headers

    @property
    def identity(self) -> dict[str, Any]:
        """Those that decide what an episode shows and what its rewards mean."""
        return self.model_dump(include={"reset", "show", "cumulative", "reply", "system", "forfeit"})


def options_of(args: Mapping[str, Any], name: str) -> Options:
    """The options of a recipe's ``args``.

    Raises:
        EnvSpecError: An unknown key or a wrong type.
    """
    try:
        return Options.model_validate(dict(args), strict=True)
    except ValidationError as error:
        raise EnvSpecError(f"environment {name}: {'; '.join(map(_told, error.errors()))}") from None


def _filled(text: str, key: str) -> str:
    """``text`` with the values of the environment variables that it names."""

    def value(found: re.Match[str]) -> str:
        known = os.environ.get(found[1])
        if not known:
            raise EnvSpecError(f"args.{key}: the environment variable {found[0]} is not set")
        return known

    return re.sub(r"\$([A-Za-z_]\w*)", value, text)


def _told(detail: Any) -> str:
    key = ".".join(map(str, detail["loc"]))
    if detail["type"] != "extra_forbidden":
        return f"args.{key}: {detail['msg']}; found {detail['input']!r:.80}"
    near = difflib.get_close_matches(key, Options.model_fields, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return (
        f"args.{key}: a server has no such argument; {hint}allowed: {', '.join(Options.model_fields)} "
        f"(what its reset takes is written args.reset.{key})"
    )
