"""The Task API: which episodes there are, for whoever picks them by ``reset(split=…, index=…)``.

    GET  /list_environments        ["catch"], or nothing of one without tasks
    GET  /catch/splits             [{"name": "train", "type": "train"}, …]
    POST /catch/num_tasks          {"split": "test"}                          -> {"num_tasks": 500}
    POST /catch/task               {"split": "test", "index": 12}             -> {"task": {…}}
    POST /catch/tasks              {"split": "test"}                          -> {"tasks": […], "env_name": …}
    POST /catch/task_range         {"split": "test", "start": 0, "stop": 32}  -> {"tasks": […]}

Routes and bodies are those of https://huggingface.co/docs/openenv/main/guides/task-api. A task of a Turnwise
environment is ``{"id", "index", "split", "task": the row}``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Path, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field

from turnwise.errors import TaskError
from turnwise.openenv import payload
from turnwise.openenv.served import Served
from turnwise.openenv.server.route import as_json

KINDS = ("train", "validation", "test")
Name = Annotated[str, Path(description="The environment's name, in upper or lower case.")]


class SplitRequest(BaseModel):
    """``/tasks`` and ``/num_tasks``."""

    split: str = Field(max_length=255)


class TaskRequest(SplitRequest):
    """``/task``."""

    index: int


class RangeRequest(SplitRequest):
    """``/task_range``: ``start`` included, ``stop`` not; without them from the first, to the last."""

    start: int | None = Field(None, ge=0)
    stop: int | None = Field(None, ge=0)


def task_router(served: Served, route: type[APIRoute]) -> APIRouter:
    """The routes; to be included last, as ``{env_name}`` matches any name."""
    router = APIRouter(tags=["Task API"], responses=_FAILURES, route_class=route)

    def named(env_name: str) -> None:
        if env_name.lower() != served.name.lower():
            raise HTTPException(404, f"no environment '{env_name}' here; there is '{served.name}'")

    async def splits_of(env_name: str) -> Sequence[str]:
        named(env_name)
        splits = await asyncio.to_thread(served.splits)
        if not splits:
            raise HTTPException(501, f"environment {served.name} has no tasks")
        return splits

    async def rows(env_name: str, split: str) -> Sequence[Any]:
        """As the environment has them; `sent` makes one what it is sent as, images and all."""
        splits = await splits_of(env_name)
        try:
            return await asyncio.to_thread(served.tasks, split)
        except TaskError as error:
            raise HTTPException(400, f"{error}; there are: {', '.join(splits)}") from error

    async def sent(found: Sequence[Any], split: str, indices: range) -> list[Any]:
        ours = "turnwise" in await served.metadata()
        return [_task(split, index, found[index]) if ours else found[index] for index in indices]

    @router.get("/list_environments", summary="The environment's name, if it has tasks")
    async def list_environments() -> list[str]:
        return [served.name] if await asyncio.to_thread(served.splits) else []

    @router.get("/{env_name}/splits", summary="Names of the splits")
    async def splits(env_name: Name) -> list[dict[str, str]]:
        found = await splits_of(env_name)
        return [{"name": one, "type": one if one in KINDS else "validation"} for one in found]

    @router.post("/{env_name}/tasks", summary="All tasks of a split")
    async def tasks(env_name: Name, request: SplitRequest) -> Response:
        found = await rows(env_name, request.split)
        chosen = await sent(found, request.split, range(len(found)))
        return as_json({"tasks": chosen, "env_name": served.name})

    @router.post("/{env_name}/num_tasks", summary="How many tasks a split has")
    async def num_tasks(env_name: Name, request: SplitRequest) -> dict[str, int]:
        return {"num_tasks": len(await rows(env_name, request.split))}

    @router.post("/{env_name}/task", summary="One task")
    async def task(env_name: Name, request: TaskRequest) -> Response:
        found = await rows(env_name, request.split)
        if not 0 <= request.index < len(found):
            raise HTTPException(400, f"split '{request.split}' has tasks 0 to {len(found) - 1}")
        (one,) = await sent(found, request.split, range(request.index, request.index + 1))
        return as_json({"task": one})

    @router.post("/{env_name}/task_range", summary="Some tasks of a split")
    async def task_range(env_name: Name, request: RangeRequest) -> Response:
        found = await rows(env_name, request.split)
        chosen = range(len(found))[request.start : request.stop]
        return as_json({"tasks": await sent(found, request.split, chosen)})

    return router


def _task(split: str, index: int, row: Any) -> dict[str, Any]:
    return {"id": f"{split}-{index}", "index": index, "split": split, "task": payload.task(row)}


_FAILURES: dict[int | str, dict[str, Any]] = {
    400: {"description": "No such split, or no such row"},
    404: {"description": "No such environment"},
    501: {"description": "The environment has no tasks"},
}
