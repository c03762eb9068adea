"""`VllmServer`: one vLLM server over HTTP. Its routes as methods, its refusals as errors that say what to do.

The routes are vLLM's own (0.32, 0.33): ``/inference/v1/generate`` takes and gives token ids; those that hold,
load and label weights are there with ``VLLM_SERVER_DEV_MODE=1``.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import orjson

from turnwise.engines.vllm_answer import Drawn, drawn_of
from turnwise.errors import EngineError
from turnwise.types import Sampling

log = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
"""To reach a server that listens."""
ASK_SECONDS = 60.0
"""For an answer to a question about its state."""
CONTROL_SECONDS = 900.0
"""For weights: a large model takes minutes to read."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")
_NO_ADAPTER = "No adapter found"
_SEED_BITS = (1 << 63) - 1


class NothingSampledError(EngineError):
    """A server was not reached, or turned a request away: asking again, there or elsewhere, loses nothing."""


class ServerLostError(EngineError):
    """A server went away while it was at something, or says nothing: what was sampled is lost."""


class StrangerError(EngineError):
    """A server has not got this run's weights any more: it was started anew, or another took it."""


class VllmServer:
    """One server.

    Args:
        url: ``http://127.0.0.1:8000``.
        key: What it was started with as ``--api-key``.
    """

    def __init__(self, url: str, *, key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self.model = ""
        """The name that requests for its own model bear."""
        self.root = ""
        """What it was started with: a Hub name or a directory."""
        self.max_context = 0
        self._client = httpx.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(ASK_SECONDS, connect=CONNECT_SECONDS, pool=None),
            # A proxy of this machine does not lead to the machine itself.
            trust_env=httpx.URL(self.url).host not in LOOPBACK,
            # uvicorn drops idle connections after 5 s: one that is about to go must not be used again.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0),
        )

    def __str__(self) -> str:
        return self.url

    # -- what it is ---------------------------------------------------------------------------------

    async def wait(self, seconds: float) -> None:
        """Until it is up.

        Raises:
            EngineError: It is not, after so long.
        """
        loop = asyncio.get_running_loop()
        until, told = loop.time() + seconds, False
        while True:
            try:
                await self.ping(min(ASK_SECONDS, max(1.0, until - loop.time())))
                return
            except (NothingSampledError, ServerLostError) as error:
                if loop.time() >= until:
                    raise EngineError(
                        f"no vLLM server answers at {self.url} after {seconds:g} s ({error}). Start one with "
                        "`turnwise vllm up MODEL`, or correct engine.urls; one that needs longer: "
                        "engine.start_seconds"
                    ) from error
                if not told:
                    log.warning("waiting for the vLLM server %s, up to %g s: %s", self.url, seconds, error)
                told = True
            await asyncio.sleep(min(1.0, seconds / 10))

    async def ping(self, seconds: float) -> None:
        """Ask whether it is there.

        Raises:
            NothingSampledError, ServerLostError: It did not say so in time.
        """
        await self._ask("GET", "/health", seconds=seconds)

    async def describe(self) -> None:
        """Find out what it serves."""
        cards = (await self._ask("GET", "/v1/models"))["data"]
        own = next((card for card in cards if card.get("parent") is None), None)
        if own is None or not own.get("max_model_len"):
            raise EngineError(
                f"{self.url} serves no model of its own; found {[card['id'] for card in cards]}"
            )
        self.model, self.root, self.max_context = own["id"], own["root"] or own["id"], own["max_model_len"]

    async def adapters(self) -> list[str]:
        """The LoRA adapters that it holds, by name."""
        cards = (await self._ask("GET", "/v1/models"))["data"]
        return [card["id"] for card in cards if card.get("parent") is not None]

    async def label(self) -> str:
        """The name of its present weights; ``default`` for those that it was started with."""
        try:
            return str((await self._ask("GET", "/weight_info"))["weight_version"])
        except _RouteError as error:
            raise EngineError(
                f"{self.url} has no routes for weights: start it with VLLM_SERVER_DEV_MODE=1 in its "
                "environment (`turnwise vllm up` does)"
            ) from error

    async def idle_reason(self) -> str | None:
        """``paused`` or ``asleep`` where it takes requests and serves none."""
        for path, key, reason in (
            ("/is_sleeping", "is_sleeping", "asleep"),
            ("/is_paused", "is_paused", "paused"),
        ):
            try:
                if (await self._ask("GET", path))[key]:
                    return reason
            except _RouteError:  # Not every build has a sleep mode.
                continue
        return None

    async def world_size(self) -> int:
        """Its workers, over all of its replicas."""
        return int((await self._ask("GET", "/get_world_size"))["world_size"])

    async def runs_on_cpu(self) -> bool:
        """Whether it has no accelerator; the first answer takes a server some ten seconds."""
        info = await self._ask("GET", "/server_info?config_format=json", seconds=CONTROL_SECONDS)
        return bool(info["vllm_config"]["device_config"]["device"] == "cpu")

    # -- sampling -----------------------------------------------------------------------------------

    async def generate(
        self,
        request: str,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        *,
        salt: str,
        model: str | None = None,
        seconds: float | None = None,
    ) -> Drawn:
        """Sample a reply.

        Args:
            request: A name for it, to `abort` it by.
            prompt_ids: The whole context.
            sampling: How to draw.
            salt: Only requests with the same salt share KV.
            model: An adapter's name in place of the server's own model.
            seconds: How long the answer may take; None leaves that to the caller.

        Raises:
            NothingSampledError: It may be asked again.
            ForeignTokenError: A sampled token has no logprob or no version.
            EngineError: It refused, or failed.
        """
        body = {
            "request_id": request,
            "model": model or self.model,
            "token_ids": list(prompt_ids),
            "sampling_params": {
                "max_tokens": sampling.max_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "min_p": sampling.min_p,
                "seed": None if sampling.seed is None else sampling.seed & _SEED_BITS,
                # What ends a reply is the caller's: the model's own end of sequence need not be among it.
                "stop_token_ids": list(sampling.stop_ids),
                "ignore_eos": True,
                "logprobs": 0,
                "detokenize": False,
            },
            "cache_salt": salt,
        }
        try:
            return drawn_of(
                await self._ask("POST", "/inference/v1/generate", body, seconds=seconds), self.url
            )
        except _RouteError as error:
            if error.status == 403 or "model" not in str(error):
                raise EngineError(
                    f"{self.url} takes no token ids: start it with --enable-scale-out (`turnwise vllm up` "
                    f"does). It said: {error}"
                ) from error
            raise StrangerError(
                f"{self.url} does not serve {body['model']!r} any more: {error}. Was it started anew?"
            ) from error

    async def abort(self, requests: Sequence[str]) -> None:
        """End requests; each answers with what it has sampled so far. Unknown ones are ignored."""
        names = [f"generate-tokens-{request}" for request in requests]
        await self._ask("POST", "/inference/v1/abort_requests", {"request_ids": names})

    async def check_logprobs(self, prompt_ids: Sequence[int]) -> None:
        """See that its logprobs are those of the distribution that is drawn from.

        Cut to the likeliest token, that has a probability of 1; or of 1/2, 1/3 … where the first are equal,
        which bfloat16 makes of what is close.

        Raises:
            EngineError: They are not.
        """
        one = Sampling(max_tokens=1, top_k=1)
        drawn = await self.generate("turnwise-probe", prompt_ids, one, salt="probe", seconds=CONTROL_SECONDS)
        equal = math.exp(-drawn.logprobs[0])
        if equal > 8.5 or abs(equal - round(equal)) > 1e-3:
            raise EngineError(
                f"{self.url} gives the logprobs of another distribution than it draws from: start it with "
                "--logprobs-mode processed_logprobs (`turnwise vllm up` does)"
            )

    # -- weights ------------------------------------------------------------------------------------

    async def pause(self, *, clear: bool) -> None:
        """Hold all requests where they are; ``clear`` forgets their KV, to be computed again."""
        query = f"mode=keep&clear_cache={json.dumps(clear)}"
        await self._ask("POST", f"/pause?{query}", seconds=CONTROL_SECONDS)

    async def resume(self) -> None:
        """Go on."""
        await self._ask("POST", "/resume", seconds=CONTROL_SECONDS)

    async def forget_kv(self) -> None:
        """Forget all KV, that of held requests included.

        Raises:
            EngineError: It would not.
        """
        path = "/reset_prefix_cache?reset_running_requests=true"
        answer = await self._ask("POST", path, seconds=CONTROL_SECONDS)
        if not answer.get("success"):
            raise EngineError(f"{self.url} could not forget the KV of the weights before")

    async def init_transfer(self, info: Mapping[str, Any]) -> None:
        """Agree on how weights come."""
        await self._ask("POST", "/init_weight_transfer_engine", {"init_info": info}, seconds=CONTROL_SECONDS)

    async def start_update(self) -> None:
        """Get ready for new weights; what was left of an update that broke off is ended first."""
        try:
            await self._ask("POST", "/start_weight_update", seconds=CONTROL_SECONDS)
        except EngineError as error:
            if "already active" not in str(error):
                raise
            await self._ask("POST", "/finish_weight_update", {}, seconds=CONTROL_SECONDS)
            await self._ask("POST", "/start_weight_update", seconds=CONTROL_SECONDS)

    async def update(self, info: Mapping[str, Any]) -> None:
        """Take some of the new weights."""
        await self._ask("POST", "/update_weights", {"update_info": info}, seconds=CONTROL_SECONDS)

    async def finish_update(self, label: str) -> None:
        """Have all of them, under this label."""
        await self._ask("POST", "/finish_weight_update", {"weight_version": label}, seconds=CONTROL_SECONDS)

    async def set_label(self, label: str) -> None:
        """Name the weights that are there."""
        await self._ask("POST", "/update_weight_version", {"new_version": label})

    async def reload(self, directory: str) -> None:
        """Have vLLM itself read a model directory."""
        call = {"method": "reload_weights", "kwargs": {"weights_path": directory}}
        await self._ask("POST", "/collective_rpc", call, seconds=CONTROL_SECONDS)

    async def takes_adapters(self) -> None:
        """Ask it for an adapter that is not there.

        Raises:
            EngineError: It would not take one that is.
        """
        try:
            await self.load_adapter("turnwise:probe", "/turnwise/probe")
        except EngineError as error:
            if _NO_ADAPTER not in str(error):
                raise

    async def load_adapter(self, name: str, directory: str) -> None:
        """Take a LoRA adapter.

        Raises:
            EngineError: It cannot hold adapters, or not this one.
        """
        body = {"lora_name": name, "lora_path": directory}
        try:
            await self._ask("POST", "/v1/load_lora_adapter", body, seconds=CONTROL_SECONDS)
        except NothingSampledError:
            raise
        except EngineError as error:
            hint = (
                "set engine.weights_dir to a directory that the trainer and every server share"
                if _NO_ADAPTER in str(error)
                else "it has to be started with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment, "
                "--enable-lora and a --max-lora-rank that suffices: `turnwise vllm up --lora-rank R` does so"
            )
            raise EngineError(f"{self.url} does not load the adapter: {error}; {hint}") from error

    async def unload_adapter(self, name: str) -> None:
        """Forget a LoRA adapter; an unknown one is no error."""
        try:
            await self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        except _RouteError:
            return

    async def aclose(self) -> None:
        """Let the connections go."""
        await self._client.aclose()

    # -- the wire -----------------------------------------------------------------------------------

    async def _ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        seconds: float | None = ASK_SECONDS,
    ) -> dict[str, Any]:
        """One request, one answer; what is no JSON object is an empty one."""
        content = None if body is None else orjson.dumps(body)
        timeout = httpx.Timeout(seconds, connect=CONNECT_SECONDS, pool=None)
        try:
            response = await self._client.request(
                method, path, content=content, timeout=timeout, headers={"Content-Type": "application/json"}
            )
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise NothingSampledError(
                f"{self.url} cannot be reached: {error or type(error).__name__}"
            ) from error
        except httpx.TimeoutException as error:
            raise ServerLostError(f"{self.url} did not answer {path} within {seconds:g} s") from error
        except httpx.HTTPError as error:
            raise ServerLostError(
                f"{self.url} broke off during {path}: {error or type(error).__name__}"
            ) from error
        if response.status_code in (429, 503):
            raise NothingSampledError(f"{self.url} takes no requests at present: {_said(response)}")
        if response.status_code in (403, 404, 405):
            raise _RouteError(response.status_code, _said(response))
        if response.status_code == 401:
            raise EngineError(f"{self.url} asks for a key: set VLLM_API_KEY to what it was started with")
        if response.is_error:
            raise EngineError(f"{self.url} answered {path} with {response.status_code}: {_said(response)}")
        return _json(response)


class _RouteError(EngineError):
    """A route that is not there, or not allowed."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def _json(response: httpx.Response) -> dict[str, Any]:
    try:
        found = orjson.loads(response.content)
    except orjson.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _said(response: httpx.Response, limit: int = 600) -> str:
    """What an error's body says."""
    error = _json(response).get("error")
    text = error.get("message") if isinstance(error, dict) else error
    return " ".join(str(text or response.text or response.reason_phrase).split())[:limit]
