"""`create_app`: an environment as an application, called as openenv-core's is.

    from turnwise.openenv import create_app                         # in place of openenv.core.env_server

    app = create_app(Connect4Environment, Connect4Action, Connect4Observation, max_concurrent_envs=64)
    app = create_app(Shop)                                     # a `turnwise.Env`, whose actions are its tools

What differs: where no number is given, an environment that supports several sessions has as many as the
server holds; in production mode ``/ws`` refuses reset, step and state as HTTP does; the page at ``/web``
needs no Gradio.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from functools import partial
from typing import Any, Literal

from fastapi import FastAPI

from turnwise.envs.base import Env
from turnwise.envs.registry import make
from turnwise.errors import EnvSpecError
from turnwise.openenv.hosted import hosted
from turnwise.openenv.served import Served
from turnwise.openenv.server.app import add_routes, create_server_app
from turnwise.openenv.server.settings import Settings, asked_for
from turnwise.openenv.typed import CALL_SECONDS, TypedEnv
from turnwise.openenv.typed_class import class_made_by, models_of, written_for_openenv

log = logging.getLogger(__name__)

Mode = Literal["simulation", "production"]


def create_app(
    env: Callable[[], Any],
    action_cls: type[Any] | None = None,
    observation_cls: type[Any] | None = None,
    env_name: str | None = None,
    max_concurrent_envs: int | None = None,
    concurrency_config: Any = None,
    gradio_builder: Callable[..., Any] | None = None,
    custom_tab_name: str = "Custom",
    custom_tab_primary: bool = False,
    show_default_tab: bool = True,
    title_override: str | None = None,
    *,
    mode: Mode | str = "simulation",
    settings: Settings | None = None,
    call_seconds: float | None = None,
) -> FastAPI:
    """The application of an environment's class, theirs or ours.

    Args:
        env: The class, or a function that makes an environment. Of a `turnwise.Env`: the class, or a partial
            with keyword arguments.
        action_cls: Of its actions; None where the class says it, or all are tool calls.
        observation_cls: Of its observations.
        env_name: What routes and pages call it.
        max_concurrent_envs: Sessions at once; None is as many as environment and server allow.
        concurrency_config: That, and how long a session may be idle; a `ConcurrencyConfig` of theirs or ours.
        gradio_builder: Not used, and that is logged, as of what follows.
        custom_tab_name: Of Gradio.
        custom_tab_primary: Of Gradio.
        show_default_tab: Of Gradio.
        title_override: The page's title.
        mode: ``production`` leaves agents their tools at ``/mcp``, and nobody anything else of an episode.
        settings: Of the server, beside what the arguments above say.
        call_seconds: The deadline of one call into the environment; None is a `turnwise.Env`'s own, or 600 s.

    Raises:
        EnvSpecError: Arguments that contradict each other, or more sessions than the environment supports.
        EnvError: Several sessions are asked for, and ``env``, called to see whether its class supports them,
            raised.
    """
    if (
        gradio_builder is not None
        or custom_tab_name != "Custom"
        or custom_tab_primary
        or not show_default_tab
    ):
        log.warning("Gradio's tabs are not used: the page at /web is Turnwise's own")
    served, settings = _made(
        env, action_cls, observation_cls, max_concurrent_envs, concurrency_config,
        name=env_name, mode=_mode(mode), settings=settings, call_seconds=call_seconds,
    )  # fmt: skip
    app = create_server_app(served, settings=settings)
    app.title = title_override or app.title
    return app


def create_fastapi_app(
    env: Callable[[], Any],
    action_cls: type[Any] | None = None,
    observation_cls: type[Any] | None = None,
    max_concurrent_envs: int | None = None,
    concurrency_config: Any = None,
) -> FastAPI:
    """`create_app` in the form without a page's arguments."""
    return create_app(
        env,
        action_cls,
        observation_cls,
        max_concurrent_envs=max_concurrent_envs,
        concurrency_config=concurrency_config,
    )


class HTTPEnvServer:
    """An environment whose routes join those of an application that there is already; as `create_app`."""

    def __init__(
        self,
        env: Callable[[], Any],
        action_cls: type[Any] | None = None,
        observation_cls: type[Any] | None = None,
        max_concurrent_envs: int | None = None,
        concurrency_config: Any = None,
    ) -> None:
        self._given = (env, action_cls, observation_cls, max_concurrent_envs, concurrency_config)
        _made(*self._given)

    def register_routes(self, app: FastAPI, mode: Mode | str = "simulation") -> None:
        """Add the routes.

        Raises:
            EnvSpecError: There is no such mode.
        """
        served, settings = _made(*self._given, mode=_mode(mode))
        add_routes(app, served, settings)


def _made(
    env: Callable[[], Any],
    action_cls: type[Any] | None,
    observation_cls: type[Any] | None,
    max_concurrent_envs: int | None,
    concurrency_config: Any,
    *,
    name: str | None = None,
    mode: Mode = "simulation",
    settings: Settings | None = None,
    call_seconds: float | None = None,
) -> tuple[Served, Settings]:
    if max_concurrent_envs is not None and concurrency_config is not None:
        raise EnvSpecError(
            "Cannot specify both 'max_concurrent_envs' and 'concurrency_config': the second holds the first"
        )
    settings = settings or Settings(token=asked_for())
    if concurrency_config is not None:
        max_concurrent_envs = concurrency_config.max_concurrent_envs
        if concurrency_config.session_timeout is not None:
            settings = replace(settings, idle_timeout=concurrency_config.session_timeout)
    served = _served(env, action_cls, observation_cls, name, mode, call_seconds)
    if max_concurrent_envs is not None and max_concurrent_envs > 1:
        if isinstance(served, TypedEnv):
            served.known_class()  # What keeps it from being made is told, not taken for a class unmarked.
        own = served.max_sessions
        if own is not None and max_concurrent_envs > own:
            raise EnvSpecError(
                f"Environment '{served.name}' is not marked as SUPPORTS_CONCURRENT_SESSIONS: found "
                f"max_concurrent_envs={max_concurrent_envs}; set it to 1, or mark the class once its "
                "instances share nothing"
            )
    if max_concurrent_envs is not None:
        settings = replace(settings, max_sessions=max_concurrent_envs)
    return served, replace(settings, mode=mode)


def _served(
    env: Callable[[], Any],
    action_cls: type[Any] | None,
    observation_cls: type[Any] | None,
    name: str | None,
    mode: Mode,
    call_seconds: float | None,
) -> Served:
    cls = class_made_by(env)
    if cls is None or not issubclass(cls, Env):
        if cls is not None and written_for_openenv(cls):
            own_action, own_observation, _ = models_of(cls)
            action_cls, observation_cls = action_cls or own_action, observation_cls or own_observation
        seconds = call_seconds or CALL_SECONDS
        return TypedEnv(env, action_cls, observation_cls, name=name, mode=mode, call_seconds=seconds)
    if action_cls is not None or observation_cls is not None:
        raise EnvSpecError(
            f"{cls.__name__} is a turnwise.Env, whose actions are its tools and replies: leave out the "
            f"classes of action and observation, create_app({cls.__name__})"
        )
    args: dict[str, Any] = {}
    if isinstance(env, partial):
        if env.args:
            raise EnvSpecError(f"create_app(partial({cls.__name__}, …)): give its arguments by name")
        args = env.keywords
    made = hosted(make(cls, name=name, args=args))
    if call_seconds is None:
        return made
    return replace(made, limits=replace(made.limits, call_seconds=call_seconds))


def _mode(mode: Mode | str) -> Mode:
    text = str(mode.value if isinstance(mode, Enum) else mode).lower()
    if text == "production":
        return "production"
    if text == "simulation":
        return "simulation"
    raise EnvSpecError(f"Invalid mode: '{mode}'. Must be one of: simulation, production")
