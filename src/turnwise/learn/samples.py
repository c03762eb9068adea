"""Samples: from trajectories to rows of tokens, with the loss on the policy's own tokens and nowhere else.

For RL the recorded ids are taken as they are: tokens in are tokens out. For SFT, replies that were sampled
keep their ids too; demonstrated ones (a teacher's, a person's) are rendered as the policy would have said
them.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from turnwise.chat.base import Renderer
from turnwise.errors import LearnError
from turnwise.types import Message, Sample, Segment, ToolSchema, Trajectory, Turn

_NOT_SAMPLED = -1
"""Version of a token that no weights drew."""


def rl_samples(
    trajectory: Trajectory, advantage: float | Sequence[float], *, allow_cuts: bool = False
) -> list[Sample]:
    """One sample for each segment of a sampled trajectory, from its recorded ids.

    Weights are 0 until `turnwise.learn.normalise.weigh` sets them over the whole update.

    Args:
        trajectory: Played by an engine.
        advantage: One for each turn, over all segments in order, given to each of the turn's sampled
            tokens; or one for all turns.
        allow_cuts: Whether the loss corrects for the sampler. Where top-k, top-p or min-p cut its
            distribution, a kept token was drawn with its probability over the kept mass.

    Raises:
        LearnError: The trajectory was demonstrated, or its sampling cut the distribution.
    """
    sampling = trajectory.sampling
    if sampling is None:
        raise LearnError(
            f"trajectory {trajectory.id} was demonstrated by {trajectory.policy!r}, not sampled: RL needs "
            "the probability of each token; learn from demonstrations with SFT"
        )
    if sampling.truncates and not allow_cuts:
        raise LearnError(
            f"trajectory {trajectory.id} was sampled with top_k={sampling.top_k}, top_p={sampling.top_p}, "
            f"min_p={sampling.min_p}: its logprobs are not those of the policy that is trained. "
            "Set top_k to 0, top_p to 1 and min_p to 0 in rl.sampling, or rl.correction.kind to what weighs "
            "tokens by the sampler's own probabilities, such as tis"
        )
    turns = len(trajectory.turns)
    advantages = [advantage] * turns if isinstance(advantage, float) else list(advantage)
    assert len(advantages) == turns, f"{len(advantages)} advantages for {turns} turns of {trajectory.id}"
    samples = []
    for segment in trajectory.segments:
        row = _Row()
        for turn in segment.turns:
            if turn.context_ids is None or turn.ids is None or turn.logprobs is None or turn.versions is None:
                raise LearnError(
                    f"trajectory {trajectory.id} has a reply without recorded ids, logprobs and versions: "
                    "RL learns only from what an engine sampled"
                )
            row.context(turn.context_ids)
            logprobs = _drawn_with(trajectory, turn, turn.logprobs) if sampling.truncates else turn.logprobs
            row.reply(turn.ids, logprobs=logprobs, versions=turn.versions)
        if segment.turns:
            # Greedy play records untempered logprobs.
            own, advantages = advantages[: len(segment.turns)], advantages[len(segment.turns) :]
            samples.append(row.sample(trajectory, segment.images, sampling.temperature or 1.0, own))
    return samples


def _drawn_with(trajectory: Trajectory, turn: Turn, logprobs: Sequence[float]) -> list[float]:
    """The logprobs under the cut distribution that the tokens were drawn from."""
    if turn.kept_mass is None or len(turn.kept_mass) != len(logprobs):
        raise LearnError(
            f"trajectory {trajectory.id} was sampled from a cut distribution, and the kept mass was not "
            "recorded for each token: RL cannot learn from it; play it again without top_k, top_p and min_p"
        )
    return [logprob - math.log(mass) for logprob, mass in zip(logprobs, turn.kept_mass, strict=True)]


class Demonstrations:
    """Makes SFT samples. Equal replies are rendered once: teachers say few different things.

    Args:
        renderer: The run's own, the same that plays and evaluates.
        cached_replies: How many rendered replies are kept.
    """

    def __init__(self, renderer: Renderer, *, cached_replies: int = 4096) -> None:
        self._renderer = renderer
        self._replies: OrderedDict[str, list[int]] = OrderedDict()
        self._cached_replies = cached_replies

    def samples(self, trajectory: Trajectory) -> list[Sample]:
        """One sample for each segment; more where the template cannot be extended.

        Recorded contexts and replies are used where there are any. The loss is that of the untempered policy.

        Raises:
            TemplateError: The template cannot render the conversation or a reply.
        """
        return [
            sample
            for segment in trajectory.segments
            if segment.turns
            for sample in self._segment(trajectory, segment)
        ]

    def _segment(self, trajectory: Trajectory, segment: Segment) -> list[Sample]:
        rows = [_Row()]
        images = [segment.images]
        messages = list(segment.prompt)
        recorded = True
        new: Sequence[Message] = segment.prompt
        for turn in segment.turns:
            # A recorded bridge continues recorded tokens; after a rendered reply it may not fit.
            recorded = recorded and turn.context_ids is not None
            if recorded and turn.context_ids is not None:
                rows[-1].context(turn.context_ids)
            elif not rows[-1].ids:
                rendered = self._renderer.prompt(messages, trajectory.tools)
                rows[-1].context(rendered.ids)
                images[-1] = rendered.images
            else:
                bridge = self._renderer.bridge(rows[-1].ids, new, trajectory.tools)
                if bridge is None:
                    bridge = self._renderer.prompt(messages, trajectory.tools)
                    rows.append(_Row())
                    images.append(())
                rows[-1].context(bridge.ids)
                images[-1] += bridge.images
            recorded = recorded and turn.ids is not None
            said = turn.ids if turn.ids is not None else self._reply(turn, trajectory.tools, rows[-1].ids)
            rows[-1].reply(said)
            messages += [turn.message, *turn.feedback]
            new = turn.feedback
        return [row.sample(trajectory, used, 1.0) for row, used in zip(rows, images, strict=True)]

    def _reply(self, turn: Turn, tools: Sequence[ToolSchema], context_ids: Sequence[int]) -> list[int]:
        # Of what came before, only how it asks for the reply matters to the reply's tokens.
        opened = self._renderer.opens_thinking(context_ids)
        key = _reply_key(turn.message, tools, opened=opened)
        ids = self._replies.get(key)
        if ids is None:
            ids = self._renderer.reply(turn.message, tools, context_ids)
            self._replies[key] = ids
            if len(self._replies) > self._cached_replies:
                self._replies.popitem(last=False)
        else:
            self._replies.move_to_end(key)
        return ids


def _reply_key(message: Message, tools: Sequence[ToolSchema], *, opened: bool) -> str:
    """Equal for messages that render alike. Call ids count: some templates write them."""
    calls = [(call.name, dict(call.arguments), call.id, call.error, call.raw) for call in message.tool_calls]
    named = [tool.name for tool in tools] if calls else []
    return json.dumps([message.text, message.reasoning, calls, named, opened], default=str)


@dataclass(slots=True)
class _Row:
    """A segment's tokens as they are put together."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    """Where the replies are: start and end."""

    def context(self, ids: Sequence[int]) -> None:
        """Append what the policy read."""
        self.ids += ids
        self.logprobs += [0.0] * len(ids)
        self.versions += [_NOT_SAMPLED] * len(ids)

    def reply(
        self,
        ids: Sequence[int],
        *,
        logprobs: Sequence[float] | None = None,
        versions: Sequence[int] | None = None,
    ) -> None:
        """Append what the policy said."""
        self.spans.append((len(self.ids), len(self.ids) + len(ids)))
        self.ids += ids
        self.logprobs += [0.0] * len(ids) if logprobs is None else logprobs
        self.versions += [_NOT_SAMPLED] * len(ids) if versions is None else versions

    def sample(
        self,
        trajectory: Trajectory,
        images: tuple[str, ...],
        temperature: float,
        advantages: Sequence[float] = (),
    ) -> Sample:
        """The row as arrays, checked; with an advantage for each reply, or none for all."""
        length = len(self.ids)
        if not length == len(self.logprobs) == len(self.versions):
            raise LearnError(
                f"trajectory {trajectory.id} has {length} ids in a segment, {len(self.logprobs)} logprobs "
                f"and {len(self.versions)} versions: there must be one of each for every sampled token"
            )
        if self.spans[0][0] == 0:
            raise LearnError(
                f"trajectory {trajectory.id} has a reply without a context before it: its first token "
                "follows nothing, so it has no probability"
            )
        mask_T = np.zeros(length, dtype=np.bool_)
        for start, end in self.spans:
            mask_T[start:end] = True
        # Promise 2: on each of the policy's own tokens exactly once.
        assert int(mask_T.sum()) == sum(end - start for start, end in self.spans)
        advantages_T = np.zeros(length, dtype=np.float32)
        for (start, end), advantage in zip(self.spans, advantages or [0.0] * len(self.spans), strict=True):
            advantages_T[start:end] = advantage
        logprobs_T = np.array(self.logprobs, dtype=np.float32)
        return Sample(
            token_ids_T=np.array(self.ids, dtype=np.int32),
            loss_mask_T=mask_T,
            logprobs_T=logprobs_T,
            advantages_T=advantages_T,
            weights_T=np.zeros(length, dtype=np.float32),
            versions_T=np.array(self.versions, dtype=np.int32),
            trajectory_id=trajectory.id,
            group_id=trajectory.group_id,
            env=trajectory.env,
            temperature=temperature,
            images=images,
        )
