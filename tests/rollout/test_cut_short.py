"""Replies and episodes that are cut short: what is still played, and what says nothing about the policy."""

from __future__ import annotations

import asyncio

import pytest
from tests.support.rollouts import Answer, arena, call, calls, model, play, renderer

from turnwise.learn.samples import rl_samples
from turnwise.rollout.policies import ScriptedPolicy
from turnwise.types import Finish, Sampling, StopReason

LOOK = calls(call("price", item="tea"))
CONTINUE = {"cut_reply": "continue"}

# -- replies ----------------------------------------------------------------------------------------------


def test_a_call_that_is_cut_ends_the_episode_or_is_told_to_be_malformed():
    most = Sampling(max_tokens=len(renderer().reply(LOOK)) - 3)
    ended = play(model(LOOK, "3"), arena(), sampling=most)
    assert (ended.stop_reason, len(ended.turns)) == (StopReason.CUT_REPLY, 1)
    assert ended.metrics["cut_replies"] == 1 and ended.metrics["malformed_calls"] == 0

    told = play(model(LOOK, "3"), arena(limits=CONTINUE), sampling=most)
    assert told.stop_reason is StopReason.TERMINATED and told.reward == 1.0
    assert told.metrics["cut_replies"] == 1 and told.metrics["malformed_calls"] == 1
    first, second = told.turns
    assert first.finish is Finish.LENGTH and [one.error for one in first.tool_results] == ["malformed"]
    assert second.finish is Finish.STOP
    # The bridge closes what was cut: the policy goes on from its own tokens, in one segment.
    assert len(told.segments) == 1
    assert renderer().stop_ids[0] in second.context_ids and renderer().stop_ids[0] not in first.ids
    (sample,) = rl_samples(told, (1.0, 1.0))
    assert sample.token_ids_T[sample.loss_mask_T].tolist() == first.ids + second.ids


def test_text_that_is_cut_is_heard_as_it_stands():
    said = "3 and then a lot more that nobody asked for"
    done = play(model(said, "3"), arena(limits=CONTINUE), sampling=Sampling(max_tokens=4))
    assert [turn.finish for turn in done.turns] == [Finish.LENGTH, Finish.STOP]
    heard = done.turns[0].message.text
    assert said.startswith(heard) and heard != said
    assert done.turns[0].feedback[0].text == "wrong" and done.reward == 1.0


def test_where_nobody_answers_a_cut_reply_is_the_end_and_a_truncation():
    done = play(model("3 and more"), arena(Answer, limits=CONTINUE), sampling=Sampling(max_tokens=2))
    assert done.stop_reason is StopReason.CUT_REPLY and done.stop_reason.truncated
    assert done.reward == 0.5 and done.metrics["cut_replies"] == 1


def test_a_reply_that_uses_up_the_episodes_budget_ends_it_all_the_same():
    done = play(model(LOOK), arena(limits={**CONTINUE, "max_tokens": 4}))
    assert done.stop_reason is StopReason.MAX_TOKENS and len(done.turns) == 1
    prompt = len(done.turns[0].context_ids)
    done = play(model(LOOK), arena(limits={**CONTINUE, "max_context": prompt + 2}))
    assert done.stop_reason is StopReason.MAX_TOKENS and done.metrics["cut_replies"] == 1


def test_a_budget_for_all_that_follows_the_prompt_counts_tool_results_too():
    whole = play(model(LOOK, "3 coins"), arena(Answer))
    prompt, asked = len(whole.turns[0].context_ids), len(whole.turns[0].ids)
    after = len(whole.turns[1].context_ids) + len(whole.turns[1].ids)

    # The tool's answer leaves no room: the episode was cut, although its last token ends a reply.
    done = play(model(LOOK, "3"), arena(Answer, limits={"max_completion": asked + 1}))
    assert done.stop_reason is StopReason.MAX_TOKENS and done.stop_reason.truncated
    assert len(done.turns) == 1 and done.turns[0].finish is Finish.STOP
    # One token is missing at the end, and none of an exact budget is.
    done = play(model(LOOK, "3 coins"), arena(Answer, limits={"max_completion": asked + after - 1}))
    assert done.stop_reason is StopReason.MAX_TOKENS
    assert (
        sum(map(len, (done.turns[0].ids, done.turns[1].context_ids, done.turns[1].ids))) == asked + after - 1
    )
    done = play(model(LOOK, "3 coins"), arena(Answer, limits={"max_completion": asked + after}))
    assert done.stop_reason is StopReason.ANSWERED
    # The first reply alone, and the lower of two limits.
    done = play(model(LOOK), arena(Answer, limits={"max_completion": 4}))
    assert done.stop_reason is StopReason.MAX_TOKENS and done.sampled_tokens == 4
    limits = {"max_completion": 10_000, "max_context": prompt + asked + 1}
    assert play(model(LOOK, "3"), arena(Answer, limits=limits)).stop_reason is StopReason.MAX_TOKENS


def test_cut_replies_count_as_turns():
    done = play(
        model("on and on and on"), arena(limits={**CONTINUE, "max_turns": 3}), sampling=Sampling(max_tokens=2)
    )
    assert done.stop_reason is StopReason.MAX_TURNS and done.metrics["cut_replies"] == 3


# -- time -------------------------------------------------------------------------------------------------


class Slow(Answer):
    """An environment whose state takes its time, by row."""

    async def state_key(self) -> str:
        await asyncio.sleep(30 * self.task.get("slow", 0))
        return "only"


@pytest.mark.parametrize("turn", [0, 1])
def test_time_that_ran_out_before_the_first_reply_says_nothing_of_the_policy(turn):
    async def slow(context):
        await asyncio.sleep(30 if context.turn == turn else 0)
        return calls(call("look"))

    done = play(ScriptedPolicy(slow), arena(Answer, limits={"seconds": 1.2}))
    if turn == 0:
        assert done.stop_reason is StopReason.POLICY_FAILED and done.reward is None and done.rewards == {}
        assert "1.2 s ran out before the policy said anything" in done.error.message
        assert "raise limits.seconds" in done.error.message and done.error.where == "policy script"
    else:
        assert done.stop_reason is StopReason.TIME_LIMIT and done.reward == 0.5, "scored and kept"


def test_time_that_an_environment_used_up_before_the_first_reply_is_its_own_fault():
    done = play(ScriptedPolicy(["3"]), arena(Slow, limits={"seconds": 1.2}), task={"slow": 1})
    assert done.stop_reason is StopReason.ENV_FAILED and done.reward is None
    assert "state_key: the episode's 1.2 s ran out" in done.error.message
