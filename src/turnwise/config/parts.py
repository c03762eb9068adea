"""Parts that several stages share: how tokens are drawn, how weights move, how rows are packed."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from turnwise.config.section import Section


class SamplingConfig(Section):
    """How the policy's tokens are drawn."""

    max_tokens: int = Field(512, ge=1)
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)


class OptimizerConfig(Section):
    """How gradients move weights."""

    kind: Literal["adamw", "muon"] = "adamw"
    """``muon`` applies to matrices; embeddings, norms and the head stay with AdamW."""
    lr: float = Field(1e-6, gt=0)
    muon_lr: float = Field(0.02, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    """Of AdamW: added to the root of the second moment before it divides."""
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float | None = Field(1.0, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up; linear and cosine go down to ``floor`` at the stage's last update."""
    floor: float = Field(0.0, ge=0, lt=1)
    """Share of the rate that linear and cosine end at."""
    warmup_steps: int = Field(0, ge=0)


class BatchConfig(Section):
    """How samples become micro-batches; changes speed and memory, never the update."""

    row_tokens: int | None = Field(None, ge=8)
    """Length of packed rows (a longer sample gets its own); if not set, that of a micro-batch's longest."""
    micro_tokens: int = Field(8192, ge=8)
    """Tokens per forward and backward."""
    logprob_chunk: int = Field(2048, ge=1)
    """Tokens whose logits exist at one time."""
    gradient_checkpointing: bool = False
