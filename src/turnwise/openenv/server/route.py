"""`route_class`: what every HTTP route here does, in an application of its own or in one of somebody else's.

Errors of Turnwise and requests that a model refuses become JSON where they arise. Where the application is
another's, a route also asks what `turnwise.openenv.server.access` does; what that application answers on its
own routes is its own matter.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute

from turnwise.errors import ActionError, EnvError, TurnwiseError, message_of
from turnwise.openenv import wire
from turnwise.openenv.server.access import Guard
from turnwise.openenv.server.sessions import AheadError, CapacityError, GoneError

RETRY_SECONDS = 5
"""When to try again, where all sessions are taken."""

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


def route_class(guard: Guard | None) -> type[APIRoute]:
    """The class of routes.

    Args:
        guard: Whom each request is shown to; None where the whole application has one.
    """

    class Route(APIRoute):
        def get_route_handler(self) -> Handler:
            handle = super().get_route_handler()

            async def handled(request: Request) -> Response:
                if guard is not None:
                    if (refusal := guard.refusal(request.scope)) is not None:
                        return refusal
                    request = Request(request.scope, guard.bounded(request.receive))
                try:
                    return await handle(request)
                except RequestValidationError as wrong:
                    return invalid(wrong)
                except TurnwiseError as error:
                    return failed(error)

            return handled

    return Route


def failed(error: Exception) -> Response:
    """The response to an error."""
    if isinstance(error, ActionError):
        return as_json({"detail": wire.details(error)}, 422)
    if isinstance(error, GoneError):
        return as_json({"detail": str(error)}, 404)
    if isinstance(error, CapacityError):
        response = as_json({"detail": str(error), "kind": "CapacityError"}, 503)
        response.headers["Retry-After"] = str(RETRY_SECONDS)
        return response
    if isinstance(error, AheadError):
        return as_json({"detail": str(error), "kind": "AheadError"}, 429)
    kind = type(error).__name__ if isinstance(error, TurnwiseError) else EnvError.__name__
    return as_json({"detail": message_of(error), "kind": kind}, 500)


def invalid(wrong: RequestValidationError) -> Response:
    """The response to what a request's model refuses; FastAPI's own would fail on a body that is no text."""
    found = [
        {"type": one["type"], "loc": one["loc"], "msg": one["msg"], "input": wire.shown(one.get("input"))}
        for one in wrong.errors()
    ]
    return as_json({"detail": found}, 422)


def as_json(value: Mapping[str, Any], status: int = 200) -> Response:
    """A body as `turnwise.openenv.wire` writes it: NaN and numpy too."""
    return Response(wire.dump(value), status, media_type="application/json")
