"""Recipes: one YAML file, typed. Every field's docstring is its help; an unknown key names the nearest one.

turnwise run recipes/quickstart.yaml --dry-run          # the recipe, resolved
turnwise run recipes/quickstart.yaml rl.steps=10        # one key changed
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from turnwise.config.credit import CreditConfig
from turnwise.config.engine import EngineConfig
from turnwise.config.loss import CorrectionKind, KlEstimator, LossName
from turnwise.config.parts import BatchConfig, OptimizerConfig, SamplingConfig
from turnwise.config.rl import RlConfig
from turnwise.config.section import Section

__all__ = [
    "BatchConfig",
    "CollectConfig",
    "CorrectionKind",
    "CreditConfig",
    "EngineConfig",
    "EnvConfig",
    "EvaluateConfig",
    "HubConfig",
    "KlEstimator",
    "LimitsConfig",
    "LoraConfig",
    "LossName",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Recipe",
    "RlConfig",
    "SamplingConfig",
    "ScratchConfig",
    "Section",
    "SftConfig",
]


class LoraConfig(Section):
    """Train low-rank adapters in place of all weights."""

    r: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"


class ScratchConfig(Section):
    """A tiny Qwen3-architecture model from nothing, with a tokenizer fitted to the environments' own text."""

    hidden_size: int = 128
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    ffn_size: int = 384
    vocab_size: int = 432
    """At most; the tokenizer may need fewer."""
    initializer_range: float = 0.08
    episodes: int = Field(200, ge=1)
    """Teacher episodes per environment to fit the tokenizer on."""


class ModelConfig(Section):
    """The policy's model: any Hugging Face name or directory, or one made from scratch."""

    name: str | None = None
    """Hub name or directory; excludes ``scratch``."""
    revision: str | None = None
    scratch: ScratchConfig | None = None
    """Make a tiny model instead; excludes ``name``."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Compute type; if not set, float32 on CPU and bfloat16 on GPU. Master weights are always float32."""
    device: str | None = None
    """Where it is trained, as torch names it: ``cpu``, ``cuda:1``; a GPU where there is one."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """The learner's attention."""
    prompt: Literal["chat", "text"] = "chat"
    """text: a prompt is given to the model as it is, without a chat template, and one reply ends the episode;
    for models that only go on writing."""
    chat_template: str | None = None
    """Path of a Jinja file used in place of the tokenizer's own template."""
    chat_template_kwargs: dict[str, Any] = {}
    """Handed to the template at every rendering: ``enable_thinking: false``."""
    dialect: str | None = None
    """How tool calls are written (``hermes``); found from the template where it is not set."""
    thinking: Literal["keep", "template"] = "keep"
    """Where the template drops earlier turns' thinking: ``keep`` what was sampled and bridge, or start a new
    segment with the ``template``'s own rendering, which is what inference servers send."""
    lora: LoraConfig | None = None
    quantization: Literal["nf4", "fp4"] | None = None
    """Hold what ``lora`` leaves frozen in 4 bits, an eighth of the memory; needs bitsandbytes. What plays are
    the same weights, whole; where a stage begins, its model is quantized anew."""
    freeze_vision: bool = False
    """Leave a vision-language model's vision tower as it is; adapters are not put on it either."""

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if (self.name is None) == (self.scratch is None):
            raise ValueError("set exactly one of model.name and model.scratch")
        return self


class LimitsConfig(Section):
    """What ends an episode; a key that is not set leaves the environment's own limit."""

    max_turns: int | None = Field(None, ge=1)
    max_tool_calls: int | None = Field(None, ge=1)
    max_tool_turns: int | None = Field(None, ge=1)
    """Turns whose calls are run. A later reply may answer; what it calls is not run and ends the episode."""
    max_tokens: int | None = Field(None, ge=1)
    max_context: int | None = Field(None, ge=2)
    max_completion: int | None = Field(None, ge=1)
    """Tokens after the prompt: replies and tool results together, where ``max_tokens`` counts replies."""
    seconds: float | None = Field(None, gt=0)
    call_seconds: float | None = Field(None, gt=0)
    max_observation: int | None = Field(None, ge=1)
    cut_reply: Literal["end", "continue"] | None = None
    """What a reply does that ran into ``sampling.max_tokens``: end the episode (so by default), or count as
    it stands: a call that was cut is malformed, and the policy is told so."""


class EnvConfig(Section):
    """One environment of the run."""

    env: str | list[str] | None = None
    """``catch``, ``reasoning_gym:chain_sum``, ``pkg.module:Class``, ``path.py:Class``; a server by
    its address, ``http://127.0.0.1:8000``, or several alike, which share the episodes; else its name."""
    args: dict[str, Any] = {}
    """Keyword arguments of the environment; of a server, how it is played on (``docs/openenv.md``)."""
    limits: LimitsConfig = LimitsConfig()
    rewards: dict[str, float] = {}
    """Reward functions as ``pkg.module:function`` with their weights, added to the environment's own."""
    reward_weight: float = 1.0
    """Weight of the environment's own reward."""
    max_excluded: float = Field(0.5, ge=0, le=1)
    """Stop the run when a larger share of this environment's episodes fails."""


class CollectConfig(Section):
    """Play episodes to learn from."""

    policy: Literal["teacher", "engine"] | str = "teacher"
    """``teacher``, ``engine`` (the current model), or ``endpoint:URL#model``."""
    episodes: dict[str, int]
    """How many for each environment."""
    keep: dict[str, float] | float | None = None
    """Keep episodes with at least this reward, over all environments or for each; all where it is not set."""
    sampling: SamplingConfig = SamplingConfig()
    """Of ``engine`` and ``endpoint``; a teacher draws nothing."""
    concurrency: int = Field(64, ge=1)


class SftConfig(Section):
    """Supervised learning on recorded trajectories."""

    steps: int = Field(ge=1)
    batch: dict[str, int]
    """Trajectories of each environment per update."""
    weighting: Literal["token", "sample", "env"] = "token"
    """What counts equally in an update's mean: each token, each trajectory, or each environment."""
    sources: list[str] = []
    """More trajectory files (or run directories) to learn from, beside what ``collect`` kept."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-5, schedule="linear")
    rows: BatchConfig = BatchConfig()
    checkpoint_every: int = Field(100, ge=1)


class EvaluateConfig(Section):
    """Play held-out tasks."""

    tasks: dict[str, int]
    """Held-out tasks of each environment."""
    seeds: int = Field(1, ge=1)
    """Episodes of each task; pass@k is over these."""
    split: str = "test"
    greedy: bool = True
    """Play each task once more at temperature 0."""
    stages: list[Literal["untrained", "sft", "rl"]] = ["untrained", "sft", "rl"]
    """Which checkpoints to play; those that the run does not make are left out."""
    sampling: SamplingConfig = SamplingConfig()
    concurrency: int = Field(256, ge=1)
    bootstrap: int = Field(2000, ge=100)
    """Resamples for the intervals."""
    baselines: bool = True
    """Play the random and the constant-answer baselines of environments that have them."""


class ParallelConfig(Section):
    """How several processes train one model: ``torchrun --nproc-per-node 2 -m turnwise run recipe.yaml``."""

    kind: Literal["ddp", "fsdp"] = "ddp"
    """``ddp``: each process has the whole model. ``fsdp``: weights, gradients and moments are spread over the
    processes."""
    timeout: float = Field(600, gt=0)
    """Seconds after which a process that does not answer in the middle of an update is given up."""


class HubConfig(Section):
    """Upload the final model."""

    repo: str
    private: bool = True


class Recipe(Section):
    """A whole run. Stages that are not given are left out."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    """The run's directory is ``runs/<name>``."""
    seed: int = 0
    threads: int | None = Field(None, ge=1)
    """Threads for tensor work on CPU; torch's own choice where it is not set."""
    parallel: ParallelConfig = ParallelConfig()
    model: ModelConfig
    environments: dict[str, EnvConfig] = Field(min_length=1)
    """By name; a task row is routed by this name."""
    tasks: dict[str, str] = {}
    """Data sets by split (``train: rows.jsonl``): a JSON row a line, whose ``environment`` plays it."""
    engine: EngineConfig = EngineConfig()
    collect: CollectConfig | None = None
    sft: SftConfig | None = None
    rl: RlConfig | None = None
    evaluate: EvaluateConfig | None = None
    push_to_hub: HubConfig | None = None
