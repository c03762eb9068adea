"""`EngineConfig`: what samples, a model in this process or vLLM in processes of its own."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from turnwise.config.section import Section

EngineKind = Literal["embedded", "vllm"]
WeightRoute = Literal["file", "reload", "nccl", "adapter"]


class EngineConfig(Section):
    """What samples: the embedded engine, or vLLM servers."""

    kind: EngineKind = "embedded"
    """``embedded``: a copy of the model in this process. ``vllm``: the servers of ``urls``, which
    ``turnwise vllm up`` starts."""
    max_context: int | None = Field(None, ge=2)
    """Longest context in tokens; the model's own where it is not set (embedded: at most 4,096; vllm: the
    server's)."""
    kv_tokens: int | None = Field(None, ge=1)
    """embedded: KV budget in tokens over all sessions; what does not fit queues. If not set, full contexts
    fit."""
    max_sequences: int = Field(64, ge=1)
    """embedded: sequences that decode at once."""
    prefill_tokens: int = Field(2048, ge=1)
    """embedded: prompt tokens per step, so that a long prompt does not hold up everyone's next token."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """embedded: what it computes in; ``model.dtype`` where it is not set."""
    device: str | None = None
    """embedded: where it runs; a GPU where there is one."""
    urls: list[str] = []
    """vllm: the servers, ``http://127.0.0.1:8000``. Each holds the whole model; episodes are spread."""
    start_seconds: float = Field(240.0, gt=0)
    """vllm: how long to wait for a server that does not answer yet."""
    request_seconds: float = Field(1800.0, gt=0)
    """vllm: the longest that one reply may take, waiting in the server's queue included."""
    weights: WeightRoute | None = None
    """vllm: how new weights get there (docs/scaling.md). file: a safetensors file, read by Turnwise's plugin
    in the server; reload: the same, by vLLM itself; nccl: from GPU to GPU; adapter: the LoRA adapter alone.
    If not set: adapter with ``model.lora`` and no ``model.quantization``, else file."""
    weights_dir: str | None = None
    """vllm: a directory that this process and the servers see, for weights on their way; one of the system's
    temporary directories where it is not set, which other machines do not see."""
    nccl_port: int | None = Field(None, ge=1, le=65535)
    """vllm: the port of this machine where the servers meet with ``weights: nccl``; a free one if not set."""
