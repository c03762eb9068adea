"""A stand-in for the Hugging Face Hub's HTTP API: Spaces are created, committed to, asked for, downloaded."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

TOKEN = "hf_of_the_test"


@dataclass
class Space:
    private: bool = False
    hardware: str | None = None
    sdk: str | None = None
    stage: str = "RUNNING"
    host: str | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    secrets: dict[str, str] = field(default_factory=dict)
    proposed: dict[str, bytes] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


class Hub:
    """The Spaces, and the application that serves them as the Hub does."""

    def __init__(self) -> None:
        self.spaces: dict[str, Space] = {}
        self.app = app = FastAPI()

        @app.middleware("http")
        async def known(request: Request, call: Any) -> Response:
            if request.method != "GET" and request.headers.get("authorization") != f"Bearer {TOKEN}":
                return JSONResponse({"error": "Invalid username or password."}, 401)
            response: Response = await call(request)
            return response

        app.get("/api/whoami-v2")(self.whoami)
        app.post("/api/repos/create")(self.create)
        app.post("/api/validate-yaml")(lambda: {"errors": [], "warnings": []})
        app.post("/api/spaces/{org}/{name}/variables")(self.variable)
        app.post("/api/spaces/{org}/{name}/secrets")(self.secret)
        app.post("/api/spaces/{org}/{name}/preupload/{revision:path}")(self.preupload)
        app.post("/api/spaces/{org}/{name}/commit/{revision:path}")(self.commit)
        app.get("/api/spaces/{org}/{name}")(self.info)
        app.get("/api/spaces/{org}/{name}/revision/{revision:path}")(self.info)
        app.get("/api/spaces/{org}/{name}/tree/{revision}")(self.tree)
        app.api_route("/spaces/{org}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])(
            self.file
        )

    async def whoami(self, request: Request) -> Response:
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return JSONResponse({"error": "Invalid username or password."}, 401)
        return JSONResponse({"type": "user", "name": "ada", "auth": {"accessToken": {"role": "write"}}})

    async def create(self, request: Request) -> Response:
        asked = await request.json()
        repo = f"{asked.get('organization') or 'ada'}/{asked['name']}"
        assert asked["type"] == "space"
        answer = {"url": f"{request.base_url}spaces/{repo}", "name": repo}
        if repo in self.spaces:
            return JSONResponse({"error": "You already created this space repo", **answer}, 409)
        self.spaces[repo] = Space(
            private=asked.get("visibility") == "private" or bool(asked.get("private")),
            hardware=asked.get("hardware"),
            sdk=asked.get("sdk"),
        )
        return JSONResponse(answer)

    async def variable(self, org: str, name: str, request: Request) -> Response:
        asked = await request.json()
        self.spaces[f"{org}/{name}"].variables[asked["key"]] = asked["value"]
        rows = [{"key": key, "value": value} for key, value in self.spaces[f"{org}/{name}"].variables.items()]
        return JSONResponse({row["key"]: row for row in rows})

    async def secret(self, org: str, name: str, request: Request) -> Response:
        asked = await request.json()
        self.spaces[f"{org}/{name}"].secrets[asked["key"]] = asked["value"]
        return JSONResponse({})

    async def preupload(self, org: str, name: str, revision: str, request: Request) -> Response:
        asked = await request.json()
        rows = [
            {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in asked["files"]
        ]
        return JSONResponse({"files": rows})

    async def commit(self, org: str, name: str, revision: str, request: Request) -> Response:
        space = self.spaces[f"{org}/{name}"]
        proposal = request.query_params.get("create_pr") == "1"
        for line in (await request.body()).splitlines():
            row = json.loads(line)
            if row["key"] == "header":
                space.messages.append(row["value"]["summary"])
            elif row["key"] == "file":
                assert row["value"]["encoding"] == "base64"
                into = space.proposed if proposal else space.files
                into[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
        answer = {
            "commitUrl": f"{request.base_url}spaces/{org}/{name}/commit/{space.sha}",
            "commitOid": space.sha,
        }
        if proposal:
            answer["pullRequestUrl"] = f"{request.base_url}spaces/{org}/{name}/discussions/1"
        return JSONResponse(answer)

    async def info(self, org: str, name: str) -> Response:
        space = self.spaces.get(f"{org}/{name}")
        if space is None:
            return JSONResponse(
                {"error": "Repository not found"}, 404, headers={"X-Error-Code": "RepoNotFound"}
            )
        return JSONResponse(
            {
                "id": f"{org}/{name}",
                "sha": space.sha,
                "private": space.private,
                "host": space.host,
                "runtime": {"stage": space.stage, "hardware": {"current": None, "requested": None}},
                "siblings": [{"rfilename": path} for path in space.files],
            }
        )

    async def tree(self, org: str, name: str, revision: str) -> Response:
        files = self.spaces[f"{org}/{name}"].files
        return JSONResponse(
            [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in files.items()
            ]
        )

    async def file(self, org: str, name: str, revision: str, path: str) -> Response:
        space = self.spaces[f"{org}/{name}"]
        data = space.files[path]
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": space.sha}
        return Response(data, headers=headers, media_type="application/octet-stream")
