"""A server on loopback that speaks as vLLM does, one token a tick, over a model that is a single number.

Its weights are one tensor, ``shift``. It draws ``(last + 1 + shift) % vocabulary`` with the logprob
``-(1 + kv) / 8``, where ``kv`` is the shift that its context was computed with: KV that outlives its weights
shows. The wire's shapes are those of vLLM 0.32.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from safetensors.numpy import load_file

VOCABULARY = 64


class Refused(Exception):
    """An HTTP error to answer with."""

    def __init__(self, status: int, message: str, kind: str = "Error") -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": None, "code": status}}


@dataclass(eq=False)
class Job:
    """A request that is being served."""

    salt: str
    adapter: str | None
    prompt: list[int]
    kv: int | None = None
    aborted: bool = False
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[dict[str, Any]] = field(default_factory=list)


@dataclass(eq=False)
class FakeVllm:
    """One server, and what it was asked."""

    model: str = "some/model"
    max_context: int = 256
    dev_mode: bool = True
    scale_out: bool = True
    processed: bool = True
    lora: bool = True
    plugin: bool = True
    tick: float = 0.001
    most: int = 1 << 30
    """Tokens after which every request is held until this rises."""
    shift: int = 0
    label: str = "default"
    paused: bool = False
    asleep: bool = False
    busy: int = 0
    """Requests to turn away with 503 before any is served."""
    spoil: str = ""
    """What to leave out of answers: ``logprob``, ``version``, ``early`` (ends for no reason)."""
    hardware_fails: bool = False
    mute: str = ""
    """Routes that begin with this are never answered."""
    adapters: dict[str, str] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    jobs: dict[str, Job] = field(default_factory=dict)
    served: int = 0
    updating: bool = False
    cache: dict[tuple[str, str | None, int], int] = field(default_factory=dict)
    port: int = 0
    writers: set[asyncio.StreamWriter] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    # -- the model ----------------------------------------------------------------------------------

    def forget(self) -> None:
        self.cache.clear()
        for job in self.jobs.values():
            job.kv = None

    async def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        if not self.scale_out:
            raise Refused(403, "Scale-out endpoints are disabled. Restart with --enable-scale-out.")
        if self.busy:
            self.busy -= 1
            raise Refused(503, "paused")
        name = body["model"]
        if name != self.model and name not in self.adapters:
            raise Refused(404, f"The model `{name}` does not exist.", "NotFoundError")
        assert max(body["token_ids"]) < VOCABULARY, "an id beyond the vocabulary ends a real server"
        self.bodies.append(body)
        params = body["sampling_params"]
        job = Job(
            salt=body["cache_salt"], adapter=name if name != self.model else None, prompt=body["token_ids"]
        )
        self.jobs[f"generate-tokens-{body['request_id']}"] = job
        self.served += 1
        finish = "length"
        try:
            while len(job.ids) < params["max_tokens"]:
                await asyncio.sleep(self.tick)
                while (self.paused or self.asleep or len(job.ids) >= self.most) and not job.aborted:
                    await asyncio.sleep(self.tick)
                if job.aborted:
                    finish = "abort"
                    break
                if job.kv is None:
                    job.kv = self.cache.setdefault((job.salt, job.adapter, job.prompt[0]), self.shift)
                last = [*job.prompt, *job.ids][-1]
                job.ids.append((last + 1 + self.shift) % VOCABULARY)
                cut = params["top_k"] == 1 and self.processed
                job.logprobs.append(0.0 if cut else -(1 + job.kv) / 8)
                if not job.spans or job.spans[-1]["version"] != self.label:
                    job.spans.append({"version": self.label, "start": len(job.ids) - 1, "end": len(job.ids)})
                job.spans[-1]["end"] = len(job.ids)
                if job.ids[-1] in params["stop_token_ids"] or self.spoil == "early":
                    finish = "stop"
                    break
        finally:
            self.jobs.pop(f"generate-tokens-{body['request_id']}", None)
        return self._answer(job, finish)

    def _answer(self, job: Job, finish: str) -> dict[str, Any]:
        content = [
            {"token_id": token, "logprob": logprob, "rank": 1, "top_logprobs": []}
            for token, logprob in zip(job.ids, job.logprobs, strict=True)
        ]
        if self.spoil == "logprob" and content:
            content[-1]["logprob"] = -9999.0
        if self.spoil == "fewer":
            content = content[:-1]
        return {
            "request_id": "generate-tokens-x",
            "choices": [
                {
                    "index": 0,
                    "finish_reason": finish,
                    "stop_reason": None,
                    "token_ids": job.ids,
                    "logprobs": {"content": content},
                    "weight_versions": None if self.spoil == "version" else job.spans,
                }
            ],
            "usage": {"prompt_tokens_details": {"cached_tokens": 3}},
        }

    # -- routes -------------------------------------------------------------------------------------

    async def answer(self, method: str, target: str, body: dict[str, Any]) -> dict[str, Any]:
        path, _, query = target.partition("?")
        self.calls.append(target)
        match path:
            case "/health":
                return {}
            case "/v1/models":
                own = {
                    "id": self.model,
                    "root": self.model,
                    "parent": None,
                    "max_model_len": self.max_context,
                }
                adapters = [
                    {"id": name, "root": path, "parent": self.model} for name, path in self.adapters.items()
                ]
                return {"data": [own, *adapters]}
            case "/inference/v1/generate":
                return await self.generate(body)
            case "/inference/v1/abort_requests":
                for name in body["request_ids"]:
                    if name in self.jobs:
                        self.jobs[name].aborted = True
                return {}
            case "/v1/load_lora_adapter" if self.lora:
                if "nowhere" in body["lora_path"] or body["lora_path"].startswith("/turnwise"):
                    raise Refused(404, f"No adapter found for {body['lora_path']}", "NotFoundError")
                self.adapters[body["lora_name"]] = body["lora_path"]
                return {}
            case "/v1/unload_lora_adapter" if self.lora:
                if self.adapters.pop(body["lora_name"], None) is None:
                    raise Refused(404, "no such adapter", "NotFoundError")
                return {}
        if not self.dev_mode:
            raise Refused(404, "Not Found")
        match path:
            case "/weight_info":
                return {"weight_version": self.label}
            case "/is_paused":
                return {"is_paused": self.paused}
            case "/is_sleeping":
                return {"is_sleeping": self.asleep}
            case "/pause":
                self.paused = True
                if "clear_cache=true" in query:
                    self.forget()
            case "/resume":
                self.paused = False
            case "/reset_prefix_cache":
                self.forget()
                return {"success": True}
            case "/init_weight_transfer_engine":
                if not self.plugin:
                    raise Refused(500, "Call to collective_rpc method failed: missing 4 arguments")
                if body["init_info"]["model"]["vocab_size"] != VOCABULARY:
                    raise Refused(500, "this server's model has vocab_size=64, and the trainer's 65")
            case "/start_weight_update":
                if self.updating:
                    raise Refused(500, "start_weight_update called while a weight update is already active")
                self.updating = True
            case "/update_weights":
                if self.hardware_fails:
                    self.updating = False
                    raise Refused(500, "out of memory")
                self.shift = int(load_file(body["update_info"]["path"])["shift"][0])
            case "/finish_weight_update":
                self.updating = False
                self.label = body.get("weight_version", self.label)
            case "/update_weight_version":
                self.label = body["new_version"]
            case _:
                raise Refused(404, "Not Found")
        return {}

    # -- HTTP ---------------------------------------------------------------------------------------

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.add(writer)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                line, *headers = head.decode().split("\r\n")
                method, target, _ = line.split(" ")
                fields = {k.lower(): v for k, _, v in (one.partition(": ") for one in headers if one)}
                raw = await reader.readexactly(int(fields.get("content-length", 0)))
                status = 200
                while self.mute and target.startswith(self.mute):
                    await asyncio.sleep(self.tick)
                try:
                    found = await self.answer(method, target, json.loads(raw) if raw else {})
                except Refused as error:
                    status, found = error.status, error.body
                text = json.dumps(found).encode()
                writer.write(f"HTTP/1.1 {status} x\r\nContent-Length: {len(text)}\r\n\r\n".encode() + text)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self.writers.discard(writer)
            writer.close()


@asynccontextmanager
async def fake_vllm(**settings: Any) -> AsyncIterator[FakeVllm]:
    fake = FakeVllm(**settings)
    server = await asyncio.start_server(fake.serve, "127.0.0.1", 0, limit=1 << 24)
    fake.port = server.sockets[0].getsockname()[1]
    try:
        yield fake
    finally:
        server.close()
        for writer in list(fake.writers):
            writer.close()
