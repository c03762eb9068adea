"""HTTP ``/reset /step /state /schema /metadata /health``: an environment without a socket.

A reset keeps its environment for whoever made it, known by the cookie that they were given or the
``episode_id`` that they chose; a step and a state with either of these are that episode's. Without them each
request has an environment of its own, made for it and closed after it. When all are taken, an environment
that its client has not come back to, or has left idle for long, gives way to whoever waits
(`turnwise.openenv.server.sessions`).
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any
from urllib.parse import quote, unquote

from fastapi import APIRouter, Body, Cookie, Query, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, model_validator

from turnwise.errors import ActionError
from turnwise.openenv import wire
from turnwise.openenv.models import EnvironmentMetadata
from turnwise.openenv.served import ServedSession
from turnwise.openenv.server.route import as_json
from turnwise.openenv.server.sessions import GoneError, Live, Sessions

COOKIE = "turnwise_session"

SessionCookie = Annotated[str | None, Cookie(alias=COOKIE, include_in_schema=False)]


class ShallowModel(BaseModel):
    """A body that nothing recurses over too far."""

    @model_validator(mode="before")
    @classmethod
    def _shallow(cls, body: Any) -> Any:
        return wire.shallow(body)


class ResetRequest(ShallowModel):
    """``/reset``; whatever else it holds is for the environment."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"examples": [{"seed": 42}, {}]})

    seed: int | None = Field(None, ge=0, description="Of the episode's chance.")
    episode_id: str | None = Field(None, max_length=255, description="Names the episode for later requests.")


class StepRequest(ShallowModel):
    """``/step``."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"examples": [{"action": {"value": 1}}]})

    action: dict[str, Any] = Field(description="As /schema describes it.")
    timeout_s: float | None = Field(None, gt=0, description="How long it may take, in seconds.")
    episode_id: str | None = Field(None, max_length=255, description="Of the reset; else the cookie's.")
    request_id: str | None = Field(
        None, max_length=255, pattern="^[ -~]*$", description="ASCII; comes back as X-Request-Id."
    )


class StepResponse(BaseModel):
    """Of a reset and a step."""

    observation: dict[str, Any]
    reward: float | bool | None = None
    done: bool = False
    metadata: dict[str, Any] = Field({}, description="Beside the observation, never shown to a policy.")


class StateResponse(BaseModel):
    """The state's own fields beside these."""

    model_config = ConfigDict(extra="allow")

    episode_id: str | None = None
    step_count: int = Field(0, ge=0)


class SchemaResponse(BaseModel):
    """JSON schemas."""

    action: dict[str, Any]
    observation: dict[str, Any]
    state: dict[str, Any]


class MetadataResponse(EnvironmentMetadata):
    """What the environment says of itself; ``turnwise`` is for Turnwise's own client."""

    model_config = ConfigDict(extra="allow")


class HealthResponse(BaseModel):
    """The server runs."""

    status: str = "healthy"


class Failure(BaseModel):
    """What went wrong."""

    detail: Any
    kind: str | None = Field(None, description="The error's class, where it is the environment's.")


@dataclass(eq=False, slots=True)
class Episode:
    """What one client comes back to."""

    client: str
    name: str
    """Its ``episode_id``; empty where it has none."""
    opening: asyncio.Future[Live]
    claimed: bool = False
    """Its client came back with the cookie: no reset without it takes it over."""


class Held:
    """Episodes that HTTP clients come back to, by cookie and ``episode_id``.

    A cookie names a client, which meets its own episodes alone. A program that keeps no cookies means the
    newest of that ``episode_id``. With a reset it never shares what a cookie has come back to, and what none
    has it takes over: if that was another's, the other's cookie opens nothing any more.
    """

    def __init__(self, sessions: Sessions) -> None:
        self.sessions = sessions
        self._held: dict[tuple[str, str], Episode] = {}
        """By client and name."""
        self._named: dict[str, Episode] = {}
        """By name, for requests without a cookie."""

    async def make(self, cookie: str | None, episode_id: str | None) -> tuple[Live, str]:
        """The session for a reset, opened where there is none, and the cookie by which it is found again.

        Raises:
            CapacityError, EnvError: As for `Sessions.open`.
        """
        if cookie is not None:
            client, _, last = cookie.partition(".")
            name = episode_id or last
            episode = self._own(client, name)
        else:
            client, name = uuid.uuid4().hex, episode_id or ""
            episode = self._named.get(name)
            if episode is not None and episode.claimed:
                episode = None
            self._forget(episode)
        if episode is None:
            opening = asyncio.ensure_future(self.sessions.open(evict=lambda _: self._drop(made), lent=True))
            episode = made = Episode(client, name, opening, claimed=cookie is not None)
            opening.add_done_callback(partial(self._opened, episode))
            live = await asyncio.shield(self._keep(episode))
        else:
            episode.client = client
            live = await asyncio.shield(self._keep(episode))  # Others may wait for it too.
            self.sessions.keep(live)
        return live, f"{client}.{name}"

    async def find(self, cookie: str | None, episode_id: str | None) -> Live:
        """The session that a request means.

        Raises:
            GoneError: There is none.
        """
        if cookie is None:
            episode = self._named.get(episode_id or "")
        else:
            client, _, last = cookie.partition(".")
            episode = self._own(client, episode_id or last)
        if episode is None:
            raise GoneError(
                "no such episode: it was never reset, was idle for too long, gave its place to who waited, "
                "or a later reset without a cookie took it over; reset first"
            )
        live = await asyncio.shield(episode.opening)
        self.sessions.keep(live)
        return live

    def _own(self, client: str, name: str) -> Episode | None:
        episode = self._held.get((client, name))
        if episode is not None:
            episode.claimed = True
        return episode

    def _keep(self, episode: Episode) -> asyncio.Future[Live]:
        self._held[episode.client, episode.name] = episode
        if episode.name and not (episode.claimed and episode.name in self._named):
            self._named[episode.name] = episode
        return episode.opening

    def _forget(self, episode: Episode | None) -> None:
        if episode is not None:
            self._held.pop((episode.client, episode.name), None)
            if self._named.get(episode.name) is episode:
                del self._named[episode.name]

    def _opened(self, episode: Episode, opening: asyncio.Future[Live]) -> None:
        if opening.cancelled() or opening.exception() is not None:
            self._forget(episode)

    async def _drop(self, episode: Episode) -> None:
        self._forget(episode)
        await self.sessions.close(await episode.opening)


def control_router(sessions: Sessions, route: type[APIRoute]) -> APIRouter:
    """``/reset``, ``/step`` and ``/state``: what agents must never reach."""
    router = APIRouter(tags=["Environment Control"], route_class=route)
    held = Held(sessions)

    @asynccontextmanager
    async def found(cookie: str | None, episode_id: str | None) -> AsyncIterator[ServedSession]:
        """The session that a request means; for one that names none, one that passes."""
        if cookie is None and episode_id is None:
            async with sessions.passing() as session:
                yield session
        else:
            async with sessions.turn(await held.find(cookie, episode_id)) as session:
                yield session

    @router.post("/reset", response_model=StepResponse, responses=_FAILURES, summary="Start an episode")
    async def reset(
        request: Annotated[ResetRequest, Body(default_factory=ResetRequest)], cookie: SessionCookie = None
    ) -> Response:
        data = request.model_dump(exclude_unset=True)
        live, cookie = await held.make(_from_cookie(cookie), request.episode_id or None)
        async with sessions.turn(live) as session:
            answer = await session.reset(data)
        response = as_json(wire.body(answer))
        response.set_cookie(COOKIE, _as_cookie(cookie), httponly=True, samesite="strict")
        return response

    @router.post("/step", response_model=StepResponse, responses=_FAILURES, summary="Act")
    async def step(request: StepRequest, cookie: SessionCookie = None) -> Response:
        if request.model_extra:
            extra = ", ".join(request.model_extra)[:200]
            raise ActionError(f"/step takes action, timeout_s, episode_id and request_id; found {extra}")
        async with found(_from_cookie(cookie), request.episode_id or None) as session:
            answer = await session.step(request.action, seconds=request.timeout_s)
        response = as_json(wire.body(answer))
        if request.request_id is not None:
            response.headers["X-Request-Id"] = request.request_id
        return response

    @router.get("/state", response_model=StateResponse, responses=_FAILURES, summary="The episode's state")
    async def state(
        episode_id: Annotated[str | None, Query(max_length=255)] = None, cookie: SessionCookie = None
    ) -> Response:
        async with found(_from_cookie(cookie), episode_id or None) as session:
            return as_json(await session.state())

    return router


def about_router(sessions: Sessions, route: type[APIRoute]) -> APIRouter:
    """``/schema``, ``/metadata`` and ``/health``."""
    router = APIRouter(tags=["Environment Info"], route_class=route)

    @router.get("/schema", response_model=SchemaResponse, summary="JSON schemas")
    async def schema() -> Response:
        return as_json(await sessions.served.schemas())

    @router.get("/metadata", response_model=MetadataResponse, summary="What the environment is")
    async def metadata() -> Response:
        return as_json(await sessions.served.metadata())

    @router.get("/health", tags=["Health"], summary="Whether the server runs")
    async def health() -> HealthResponse:
        return HealthResponse()

    return router


def _as_cookie(cookie: str) -> str:
    return quote(cookie, safe="", errors="surrogatepass")  # Clients choose it, in any alphabet.


def _from_cookie(cookie: str | None) -> str | None:
    return None if cookie is None else unquote(cookie, errors="surrogatepass")


_FAILURES: dict[int | str, dict[str, Any]] = {
    404: {"model": Failure, "description": "No such episode"},
    422: {"model": Failure, "description": "No such action, or no such argument of a reset"},
    429: {"model": Failure, "description": "Too many requests of this episode wait"},
    500: {"model": Failure, "description": "The environment failed"},
    503: {"model": Failure, "description": "All sessions are taken"},
}
