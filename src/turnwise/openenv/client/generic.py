"""`GenericEnvClient`: an `EnvClient` for whatever a server hosts, without its package.

async with GenericEnvClient("http://127.0.0.1:8000") as env:
    await env.reset(seed=3)
    result = await env.step({"column": 3})  # result.observation is a dict
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from turnwise.errors import ActionError
from turnwise.openenv.client.env_client import EnvClient
from turnwise.openenv.models import StepResult


class GenericEnvClient(EnvClient[Any, dict[str, Any], dict[str, Any]]):
    """Any server's client, with mappings for actions, observations and states."""

    def _step_payload(self, action: Any) -> dict[str, Any]:
        if isinstance(action, Mapping):
            return dict(action)
        if hasattr(action, "model_dump"):
            return dict(action.model_dump(mode="json"))
        raise ActionError(
            f"an action is a mapping of its fields, or a pydantic model; this is {type(action).__name__}"
        )

    def _parse_result(self, payload: dict[str, Any]) -> StepResult[dict[str, Any]]:
        return StepResult(
            observation=payload.get("observation", {}),
            reward=payload.get("reward"),
            done=payload.get("done", False),
        )

    def _parse_state(self, payload: dict[str, Any]) -> dict[str, Any]:
        return payload


class GenericAction(dict[str, Any]):
    """An action of `GenericEnvClient`, written with keywords: ``GenericAction(column=3)``."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(fields)

    def __repr__(self) -> str:
        return f"GenericAction({', '.join(f'{name}={value!r}' for name, value in self.items())})"
