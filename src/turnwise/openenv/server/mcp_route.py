"""`mcp_router`: where HTTP reaches `turnwise.openenv.server.mcp`, and how ``/docs`` describes it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from turnwise.openenv.server.mcp import Mcp


def mcp_router(mcp: Mcp, route: type[APIRoute]) -> APIRouter:
    """``/mcp`` over HTTP."""
    router = APIRouter(tags=["MCP"], route_class=route)
    router.add_api_route("/mcp", mcp.http, methods=["GET"], include_in_schema=False)
    router.add_api_route(
        "/mcp", mcp.http, methods=["POST"], summary="A JSON-RPC request of an agent",
        response_class=JSONResponse, responses=_POSTED, openapi_extra={"requestBody": _REQUEST},
    )  # fmt: skip
    router.add_api_route(
        "/mcp", mcp.http, methods=["DELETE"], summary="End the session that Mcp-Session-Id names",
        status_code=204, responses={404: {"description": "No such session"}},
    )  # fmt: skip
    return router


_REQUEST: dict[str, Any] = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {
                    "jsonrpc": {"const": "2.0"},
                    "method": {"type": "string", "examples": ["tools/list", "tools/call", "initialize"]},
                    "params": {"type": "object"},
                    "id": {"type": ["string", "integer", "null"]},
                },
                "required": ["jsonrpc", "method"],
                "additionalProperties": False,
            }
        }
    },
}
_POSTED: dict[int | str, dict[str, Any]] = {
    200: {"description": "The response: a result or an error"},
    202: {"description": "A notification, which is owed no answer"},
    400: {"description": "The body is too long"},
    404: {"description": "No such session: initialize again"},
}
