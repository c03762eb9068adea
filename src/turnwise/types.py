"""The nouns: what flows from a task to a better policy.

    Task ──> Episode ──> Trajectory ──> TrajectoryGroup ──> Sample ──> Batch ──> weights

Every room speaks in these types and may import this file; this file imports only the standard library
and numpy. Arrays carry their axes in their names: ``_T`` tokens of one row, ``_BT`` packed rows × tokens,
``_G`` siblings of one group. Everything here is frozen: a noun is made once, by the room that knows it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from enum import StrEnum
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

Role = Literal["system", "user", "assistant", "tool"]
Task = Mapping[str, Any]
"""One JSON row: what an environment needs to start an episode."""

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]


# ---------------------------------------------------------------------------------------------------
# Chat


@dataclass(frozen=True, slots=True, kw_only=True)
class TextBlock:
    """A run of text inside a message of several blocks."""

    text: str
    type: Literal["text"] = "text"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageBlock:
    """An image by reference: the bytes are stored once, under their hash."""

    sha256: str
    """Hex digest of the encoded image file."""
    media_type: str = "image/png"
    type: Literal["image"] = "image"


Content = str | tuple[TextBlock | ImageBlock, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """One call that the model made, or tried to make.

    A malformed call is kept, so that the episode can tell the model what was wrong with it:

        ToolCall(name="move", arguments={}, error="arguments are not valid JSON: …", raw='{"name": "move", …')
    """

    name: str
    arguments: Mapping[str, Any]
    id: str = ""
    """Matches the tool message that answers it; unique within the trajectory when it is not empty."""
    error: str | None = None
    """What makes the call unusable; None for a well-formed one."""
    raw: str = ""
    """The text it was parsed from; only kept when ``error`` is set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolSchema:
    """A tool as the model sees it."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    """JSON schema of an object: ``{"type": "object", "properties": {…}, "required": […]}``."""

    def as_function(self) -> dict[str, Any]:
        """The form that chat templates and OpenAI-compatible endpoints take."""
        return {
            "type": "function",
            "function": {"name": self.name, "description": self.description, "parameters": self.parameters},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message of a conversation."""

    role: Role
    content: Content
    reasoning: str | None = None
    """Thinking that the template keeps apart from the content; None where there is none."""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    """On a tool message: the call that it answers."""
    name: str | None = None
    """On a tool message: the tool that answered."""

    @property
    def text(self) -> str:
        """The text of the content, blocks joined; images are left out."""
        if isinstance(self.content, str):
            return self.content
        return "".join(block.text for block in self.content if isinstance(block, TextBlock))

    def as_dict(self) -> dict[str, Any]:
        """The form that chat templates and TRL's reward functions take; images are left out."""
        out: dict[str, Any] = {"role": self.role, "content": self.text}
        if self.tool_calls:
            out["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
                for call in self.tool_calls
            ]
        if self.role == "tool":
            out["name"] = self.name
        return out

    @classmethod
    def system(cls, content: Content) -> Message:
        """A system message."""
        return cls(role="system", content=content)

    @classmethod
    def user(cls, content: Content) -> Message:
        """A user message."""
        return cls(role="user", content=content)

    @classmethod
    def assistant(cls, content: Content = "", *tool_calls: ToolCall, reasoning: str | None = None) -> Message:
        """A reply: text, tool calls, or both."""
        return cls(role="assistant", content=content, tool_calls=tool_calls, reasoning=reasoning)

    @classmethod
    def tool(cls, content: Content, *, call: ToolCall) -> Message:
        """The answer to ``call``."""
        return cls(role="tool", content=content, tool_call_id=call.id or None, name=call.name)


# ---------------------------------------------------------------------------------------------------
# Environments


@dataclass(frozen=True, slots=True)
class Step:
    """What an environment answers to a reply; a tool may return one too, to pay or to end.

    Step("The ball is at column 2.")                       # go on
    Step("Correct.", reward=1.0, terminated=True)          # the task is over
    Step("You ran out of fuel.", truncated=True)           # a limit of the environment's own
    """

    observation: Content | list[Message] = ""
    _: KW_ONLY
    reward: float | None = None
    """Paid for this step; None pays nothing."""
    terminated: bool = False
    """The task reached an end of its own."""
    truncated: bool = False
    """The environment cut it short; never set together with ``terminated``."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """JSON values for people and metrics; the policy never sees them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolResult:
    """What came of one tool call, failing ones included."""

    call: ToolCall
    content: Content
    """What the model is told."""
    error: Literal["malformed", "unknown_tool", "bad_arguments", "raised", "timeout", "bad_result"] | None = (
        None
    )
    """None when the tool ran and answered."""
    step: Step | None = None
    """Set when the tool returned a `Step`: reward, end."""
    coerced: int = 0
    """How many numbers were taken as the text of a ``str`` parameter."""
    seconds: float = 0.0


# ---------------------------------------------------------------------------------------------------
# Tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """Messages as the model reads them."""

    ids: list[int]
    images: tuple[str, ...] = ()
    """Hashes of the images, in the order of their placeholders in ``ids``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn. Stored on every trajectory, so that training can know the behaviour policy."""

    max_tokens: int = 512
    """Upper bound for one reply."""
    temperature: float = 1.0
    """0 is greedy: the logprob is then that of the untempered softmax."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps every token."""
    min_p: float = 0.0
    seed: int | None = None
    """Same seed, same prompt, same weights: same tokens, whatever else is in the running batch."""
    stop_ids: tuple[int, ...] = ()
    """A sampled id among these ends the reply and is part of it."""

    @property
    def truncates(self) -> bool:
        """Whether top-k, top-p or min-p cut the distribution."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


class Finish(StrEnum):
    """Why a reply ended."""

    STOP = "stop"
    """A stop id was sampled."""
    LENGTH = "length"
    """``max_tokens`` or the engine's context was used up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What an engine sampled.

    prompt  [5, 6, 7]      ids [8, 9, 2]   logprobs [-.1, -.7, -.2]   versions [3, 3, 4]
    2 is the stop id and is part of the reply; the weights changed before the last token was drawn.
    """

    ids: list[int]
    logprobs: list[float]
    """One for each id: log of its probability under the softmax at the sampling temperature."""
    versions: list[int]
    """One for each id: the weights that drew it."""
    finish: Finish
    kept_mass: list[float] | None = None
    """One for each id where top-k, top-p or min-p cut the distribution: the mass that was kept."""
    cached_tokens: int = 0
    """How many prompt tokens were not prefilled, because a session or a sibling held them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a policy answers. Without ids it was demonstrated (by a teacher, a person), not sampled."""

    message: Message
    context_ids: list[int] | None = None
    """What was appended before the reply: the whole prompt when ``new_segment``, the bridge otherwise."""
    new_segment: bool = False
    """The held tokens could not be extended: the conversation was rendered anew."""
    ids: list[int] | None = None
    logprobs: list[float] | None = None
    versions: list[int] | None = None
    kept_mass: list[float] | None = None
    finish: Finish = Finish.STOP
    images: tuple[str, ...] = ()
    cached_tokens: int = 0
    """How many tokens of the whole context the engine did not prefill."""


# ---------------------------------------------------------------------------------------------------
# Trajectories


class StopReason(StrEnum):
    """Why an episode ended. Exactly one of `terminated`, `truncated`, `failed` holds for each."""

    TERMINATED = "terminated"
    """The environment said so."""
    ANSWERED = "answered"
    """A reply without tool calls, to an environment that has no ``step``."""
    ENV_TRUNCATED = "env_truncated"
    """The environment cut it short."""
    MAX_TURNS = "max_turns"
    MAX_TOOL_CALLS = "max_tool_calls"
    MAX_TOKENS = "max_tokens"
    """The episode's token budget or the engine's context was used up, after at least one reply."""
    CUT_REPLY = "cut_reply"
    """A single reply ran into its own limit."""
    TIME_LIMIT = "time_limit"
    """The episode's seconds were used up, or a tool hung and could not be stopped."""
    PROMPT_TOO_LONG = "prompt_too_long"
    """The task did not fit the budget before the policy said anything."""
    ENV_FAILED = "env_failed"
    POLICY_FAILED = "policy_failed"
    SCORING_FAILED = "scoring_failed"
    CANCELLED = "cancelled"

    @property
    def terminated(self) -> bool:
        """The task reached its own end."""
        return self in (StopReason.TERMINATED, StopReason.ANSWERED)

    @property
    def failed(self) -> bool:
        """Something outside the policy's control: left out of the baseline, never scored."""
        return self in (
            StopReason.PROMPT_TOO_LONG, StopReason.ENV_FAILED, StopReason.POLICY_FAILED,
            StopReason.SCORING_FAILED, StopReason.CANCELLED,
        )  # fmt: skip

    @property
    def truncated(self) -> bool:
        """A budget ran out: scored and kept."""
        return not self.terminated and not self.failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What went wrong in an episode, as data."""

    kind: str
    """The error's class name."""
    message: str
    where: str
    """The boundary at which it was caught, such as ``environment catch: reset``."""
    traceback: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """One named component of an episode's reward."""

    value: float | None
    """None: this reward did not apply to this episode."""
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One reply and what came of it.

    Two turns of one segment; P is the prompt, A the sampled replies, B the bridge to the second:

        turn 0: context_ids = P    ids = A0    feedback = (tool message,)
        turn 1: context_ids = B    ids = A1    feedback = ()
        the engine was given P, then P + A0 + B; the segment's tokens are P + A0 + B + A1
    """

    message: Message
    """The parsed reply."""
    context_ids: list[int] | None = None
    """Appended before this reply: a segment's whole prompt, or the bridge; None if demonstrated."""
    ids: list[int] | None = None
    logprobs: list[float] | None = None
    versions: list[int] | None = None
    kept_mass: list[float] | None = None
    finish: Finish = Finish.STOP
    tool_results: tuple[ToolResult, ...] = ()
    feedback: tuple[Message, ...] = ()
    """What the policy was told in answer; the next turn's context renders it."""
    reward: float | None = None
    """Sum of what this turn's steps paid; None if nothing paid."""
    state_key: str | None = None
    """The environment's key of the state that this reply was made in, for credit by turn."""
    policy_seconds: float = 0.0
    env_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Turns over one growing row of tokens. A new one starts where the context was rewritten."""

    prompt: tuple[Message, ...]
    """The whole conversation before the first turn of this segment."""
    turns: tuple[Turn, ...]
    images: tuple[str, ...] = ()

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation at the segment's end."""
        out = list(self.prompt)
        for turn in self.turns:
            out += [turn.message, *turn.feedback]
        return tuple(out)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """One finished episode, failed ones included."""

    id: str
    """Unique in the run and the same when the run is resumed: ``rl/12/catch/3/s5``."""
    group_id: str
    env: str
    """The environment's name in the recipe."""
    task: Task
    seed: int
    tools: tuple[ToolSchema, ...] = ()
    segments: tuple[Segment, ...]
    rewards: Mapping[str, Reward]
    stop_reason: StopReason
    error: Failure | None = None
    sampling: Sampling | None = None
    """None for demonstrations."""
    policy: str
    """Who played: ``engine``, ``teacher``, ``endpoint:…``, ``person``, ``script``."""
    harness: str = ""
    """Hash of what renders, parses, limits and scores: equal hashes may be compared."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Counts: ``malformed_calls``, ``tool_errors``, ``new_segments``, ``prefilled_tokens`` …"""
    started: float = 0.0
    """Unix seconds."""
    seconds: float = 0.0

    @property
    def turns(self) -> tuple[Turn, ...]:
        """All turns, over all segments."""
        return tuple(turn for segment in self.segments for turn in segment.turns)

    @property
    def reward(self) -> float | None:
        """Weighted sum of the rewards that apply; None for a failed episode or where none applies."""
        if self.stop_reason.failed:
            return None
        values = [
            reward.weight * reward.value for reward in self.rewards.values() if reward.value is not None
        ]
        return sum(values) if values else None

    @property
    def sampled_tokens(self) -> int:
        """How many tokens the policy sampled."""
        return sum(len(turn.ids or ()) for turn in self.turns)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryGroup:
    """Siblings: episodes of one task from one seed. Found by id, never by position."""

    id: str
    env: str
    task: Task
    trajectories: tuple[Trajectory, ...]
    version: int = 0
    """The weights that were current when the group was dispatched."""

    @property
    def scored(self) -> tuple[Trajectory, ...]:
        """The siblings that have a reward: the group's baseline is over these alone."""
        return tuple(trajectory for trajectory in self.trajectories if trajectory.reward is not None)


# ---------------------------------------------------------------------------------------------------
# Learning


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One row to learn from: a segment's tokens with everything a loss needs, as plain arrays.

    A segment of prompt P, reply A0, bridge B, reply A1:

        token_ids_T  = P + A0 + B + A1
        loss_mask_T  = [False]*len(P) + [True]*len(A0) + [False]*len(B) + [True]*len(A1)
        logprobs_T   = [0]*len(P) + logprobs(A0) + [0]*len(B) + logprobs(A1)
        weights_T    = 0 wherever loss_mask_T is False

    ``logprobs_T[t]`` belongs to ``token_ids_T[t]`` itself (not to the token after it).
    """

    token_ids_T: IntArray
    loss_mask_T: BoolArray
    logprobs_T: FloatArray
    """Of the policy that sampled; 0 for demonstrations."""
    advantages_T: FloatArray
    weights_T: FloatArray
    """The algorithm's normalisation, fixed over the whole step: a loss is the plain sum of weight × term."""
    versions_T: IntArray
    """The weights that drew each token; -1 where nothing was sampled."""
    reference_logprobs_T: FloatArray | None = None
    trajectory_id: str
    group_id: str
    env: str
    temperature: float = 1.0
    images: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Tokens in the row."""
        return len(self.token_ids_T)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Samples packed into rows, one micro-batch. Two samples of 3 and 2 tokens in one row of 6:

    token_ids_BT  = [[a0 a1 a2 b0 b1  0]]
    positions_BT  = [[ 0  1  2  0  1  2]]      # padding continues the last document, which cannot see it
    documents_BT  = [[ 0  0  0  1  1 -1]]      # -1 is padding; attention never crosses documents
    loss_mask_BT, logprobs_BT, advantages_BT, weights_BT: as in the samples, 0 in padding
    """

    token_ids_BT: IntArray
    positions_BT: IntArray
    documents_BT: IntArray
    """Index into ``samples`` of each token's row of origin; -1 in padding."""
    loss_mask_BT: BoolArray
    logprobs_BT: FloatArray
    advantages_BT: FloatArray
    weights_BT: FloatArray
    temperatures_BT: FloatArray
    reference_logprobs_BT: FloatArray | None = None
    samples: tuple[Sample, ...]

    @property
    def tokens(self) -> int:
        """Real tokens, padding left out."""
        return int((self.documents_BT >= 0).sum())


class WeightSource(Protocol):
    """Weights that an engine can load: implemented by ``learn.weights``, handed over by ``pipeline``."""

    def tensors(self) -> Iterator[tuple[str, Any]]:
        """(name, tensor) under the checkpoint's Hugging Face names, full tensors, adapters merged.

        May be called more than once, and gives the same each time until the next update.
        """
        ...
