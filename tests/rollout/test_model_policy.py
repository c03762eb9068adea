"""Tokens of an episode, on the real renderer: promises 1 and 3, and budgets that are counted in tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.chat import families
from tests.support.rollouts import Answer, arena, call, calls, model, play, renderer, said

from turnwise.engines.scripted import ScriptedEngine
from turnwise.errors import EngineError
from turnwise.rollout.policies import ModelPolicy
from turnwise.types import Finish, Message, Sampling, StopReason, ToolCall

LOOK = calls(call("price", item="tea"))


def test_tokens_in_are_tokens_out_and_a_turn_is_extended_by_a_bridge():
    policy = model(LOOK, "3")
    done = play(policy, arena())
    first, second = done.turns
    prompts = [list(made.prompt_ids) for made in policy.engine.calls]
    assert first.context_ids == renderer().prompt(done.segments[0].prompt, done.tools).ids == prompts[0]
    assert prompts[1] == first.context_ids + first.ids + second.context_ids
    assert first.ids == renderer().reply(LOOK) and second.ids == renderer().reply(Message.assistant("3"))
    assert len(done.segments) == 1 and done.metrics["new_segments"] == 0
    assert first.message.tool_calls == (ToolCall(name="price", arguments={"item": "tea"}, id="t0c0"),)
    assert done.stop_reason is StopReason.TERMINATED and done.policy == "engine"


def test_each_sampled_token_has_a_logprob_and_a_version():
    policy = model(LOOK, "3")
    policy.engine.version = 5
    done = play(policy, arena(), sampling=Sampling(top_k=2))
    for turn in done.turns:
        assert len(turn.ids) == len(turn.logprobs) == len(turn.versions) == len(turn.kept_mass)
        assert set(turn.versions) == {5}
    assert done.sampled_tokens == done.metrics["sampled_tokens"] == sum(len(turn.ids) for turn in done.turns)
    assert done.sampling == Sampling(top_k=2)


def test_a_session_prefills_only_what_the_context_grew_by():
    policy = model(LOOK, "3")
    done = play(policy, arena())
    first, second = done.turns
    assert done.metrics["cached_tokens"] == len(first.context_ids + first.ids) - 1
    assert done.metrics["prefilled_tokens"] == len(first.context_ids) + len(second.context_ids) + 1
    assert policy.engine.released == ["t/0/s0"]


def test_a_template_that_cannot_be_bridged_starts_a_new_segment_and_is_counted():
    class Unbridged:
        def __init__(self):
            self.stop_ids = renderer().stop_ids
            self.prompt, self.parse = renderer().prompt, renderer().parse

        def bridge(self, context_ids, new_messages, tools=()):
            return None

    policy = ModelPolicy(ScriptedEngine(said(LOOK, LOOK, "3")), Unbridged())
    done = play(policy, arena())
    assert [len(segment.turns) for segment in done.segments] == [1, 1, 1]
    assert done.metrics["new_segments"] == 2
    assert [len(segment.prompt) for segment in done.segments] == [1, 3, 5]
    for segment in done.segments:
        assert segment.turns[0].context_ids == renderer().prompt(segment.prompt, done.tools).ids
    assert done.segments[-1].messages[:-1] == (*done.segments[-1].prompt, done.turns[-1].message)


def test_stop_ids_and_a_seed_are_sent_and_the_renderers_do_not_replace_the_recipes():
    policy = model("3")
    play(policy, arena(), sampling=Sampling(stop_ids=(1,), max_tokens=50))
    sent = policy.engine.calls[0].sampling
    assert sent.stop_ids == (1, *renderer().stop_ids)
    assert sent.seed is not None and sent.max_tokens == 50


# ---------------------------------------------------------------------------------------------------
# Budgets


def test_a_reply_cut_by_its_own_limit_ends_the_episode_as_cut():
    done = play(model(LOOK), arena(), sampling=Sampling(max_tokens=4))
    assert done.stop_reason is StopReason.CUT_REPLY and done.stop_reason.truncated
    assert done.turns[0].finish is Finish.LENGTH and len(done.turns[0].ids) == 4
    assert done.turns[0].tool_results == ()


def test_a_reply_cut_by_the_episodes_budget_is_max_tokens():
    reply = len(renderer().reply(LOOK))
    done = play(model(LOOK), arena(limits={"max_tokens": reply + 3}))
    assert done.stop_reason is StopReason.MAX_TOKENS
    assert [len(turn.ids) for turn in done.turns] == [reply, 3]


def test_a_budget_used_up_by_a_tool_call_is_truncation_after_the_tool_ran():
    reply = len(renderer().reply(LOOK))
    done = play(model(LOOK), arena(limits={"max_tokens": reply}))
    assert done.stop_reason is StopReason.MAX_TOKENS and done.stop_reason.truncated
    assert len(done.turns) == 1 and done.turns[0].feedback[0].text == "3"


def test_an_answer_that_fits_exactly_is_an_answer():
    exact = len(renderer().reply(Message.assistant("3")))
    done = play(model("3"), arena(Answer, limits={"max_tokens": exact}), sampling=Sampling(max_tokens=exact))
    assert done.stop_reason is StopReason.ANSWERED and done.reward == 0.5


@pytest.mark.parametrize("by", ["engine", "limits"])
def test_a_context_that_is_full_in_the_middle_of_a_reply_is_max_tokens(by):
    prompt = len(play(model("3"), arena()).turns[0].context_ids)
    where = arena(limits={"max_context": prompt + 2}) if by == "limits" else arena()
    policy = model(LOOK, **({"max_context": prompt + 2} if by == "engine" else {}))
    done = play(policy, where)
    assert done.stop_reason is StopReason.MAX_TOKENS and len(done.turns[0].ids) == 2


def test_a_context_that_leaves_no_room_after_a_turn_is_max_tokens():
    first = play(model(LOOK, "3"), arena()).turns[0]
    full = len(first.context_ids + first.ids)
    done = play(model(LOOK, "3"), arena(limits={"max_context": full + 1}))
    assert done.stop_reason is StopReason.MAX_TOKENS and done.stop_reason.truncated
    assert len(done.turns) == 1 and len(done.turns[0].feedback) == 1 and done.error is None


def test_a_prompt_longer_than_the_budget_is_excluded_and_says_what_to_change():
    done = play(model("3"), arena(limits={"max_context": 5}))
    assert done.stop_reason is StopReason.PROMPT_TOO_LONG and done.stop_reason.failed
    assert done.turns == () and done.reward is None
    assert "4 fit" in done.error.message and "raise max_context" in done.error.message


def test_an_engine_that_fails_excludes_the_episode_and_keeps_its_turns():
    policy = model(LOOK, "3", fault=lambda made: made.turn == 1 and EngineError("worker died"))
    done = play(policy, arena())
    assert done.stop_reason is StopReason.POLICY_FAILED and done.error.message == "worker died"
    assert len(done.turns) == 1 and done.turns[0].ids == renderer().reply(LOOK)


def test_a_reply_that_the_template_refuses_to_write_anew_does_not_excuse_the_episode():
    chat = families.renderer("gpt-oss", thinking="template")
    refused = chat.template.encoder.encode(" to=functions.price<|channel|>analysis<|message|>{}<|call|>")
    script = [refused, chat.reply(Message.assistant("2"))]
    done = play(ModelPolicy(ScriptedEngine(lambda made: script[made.turn]), chat), arena())
    assert done.stop_reason is StopReason.FORFEITED and done.reward == 0.0
    assert done.error.kind == "TemplateError" and len(done.turns) == 2


def test_a_demonstrated_turn_before_a_sampled_one_starts_a_new_segment():
    inner = model("3")

    class Mixed(ModelPolicy):
        async def act(self, context):
            if context.turn == 0:
                reply = await inner.act(replace(context, session="x"))
                return replace(reply, message=LOOK, ids=None, context_ids=None, logprobs=None, versions=None)
            return await super().act(context)

    done = play(Mixed(inner.engine, inner.renderer), arena())
    assert [len(segment.turns) for segment in done.segments] == [1, 1]
    assert done.segments[1].turns[0].context_ids == renderer().prompt(done.segments[1].prompt, done.tools).ids
