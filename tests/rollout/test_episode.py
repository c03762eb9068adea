"""What ends an episode, and what is kept of it: promises 4 and 7.

A bad rollout is data. What the policy can cause is scored and kept; what it cannot is excluded. Terminated
and truncated are apart, and a budget that runs out after a tool call is truncation.
"""

from __future__ import annotations

import asyncio
import time

import pytest
from tests.support.rollouts import Answer, Blocking, Shop, arena, call, calls, order, play

from turnwise.envs.base import Env, tool
from turnwise.errors import EngineError, EnvError, PolicyError
from turnwise.rollout.episode import play_episode
from turnwise.rollout.policies import ScriptedPolicy, TeacherPolicy
from turnwise.rollout.policy import Context
from turnwise.types import Message, Reply, Reward, Sampling, Step, StopReason, ToolCall, Trajectory

MALFORMED = ToolCall(name="price", arguments={}, error="arguments are not valid JSON", raw="{")


def test_tools_then_a_step_that_terminates():
    done = play(ScriptedPolicy([calls(call("price", item="tea")), "4", "3"]), arena())
    assert done.stop_reason is StopReason.TERMINATED
    assert [turn.message.text for turn in done.turns] == ["", "4", "3"]
    assert [[message.text for message in turn.feedback] for turn in done.turns] == [
        ["3"],
        ["wrong"],
        ["right"],
    ]
    assert [turn.reward for turn in done.turns] == [None, 0.0, 1.0]
    assert done.rewards == {"steps": Reward(value=1.0)}
    assert done.segments[0].prompt == (Message.user("What does tea cost?"),)
    assert len(done.segments) == 1 and done.sampling is None and done.policy == "script"


def test_calls_run_in_order_and_are_answered_under_their_ids():
    reply = calls(call("price", item="jam"), call("price", item="tea"), call("nope"))
    done = play(ScriptedPolicy([reply, "3"]), arena())
    made = done.turns[0].message.tool_calls
    assert [one.id for one in made] == ["t0c0", "t0c1", "t0c2"]
    assert [message.tool_call_id for message in done.turns[0].feedback] == ["t0c0", "t0c1", "t0c2"]
    assert [result.content for result in done.turns[0].tool_results[:2]] == ["4", "3"]
    assert done.metrics["tool_calls"] == 3 and done.metrics["tool_errors/unknown_tool"] == 1


def test_call_ids_are_kept_where_unique_and_told_apart_where_not():
    twice = calls(ToolCall(name="price", arguments={"item": "tea"}, id="call_0"))
    done = play(ScriptedPolicy([twice, twice, "3"]), arena())
    assert [turn.message.tool_calls[0].id for turn in done.turns[:2]] == ["call_0", "call_0.2"]


def test_after_the_end_no_tool_runs_parallel_calls_included():
    where = arena()
    reply = calls(call("price", item="tea"), call("buy", item="tea"), call("price", item="jam"))
    done = play(ScriptedPolicy([reply]), where)
    assert done.stop_reason is StopReason.TERMINATED
    assert Shop.opened[-1].log == ["tea", "buy tea"]
    assert len(done.turns[0].tool_results) == 2 and done.metrics["skipped_calls"] == 1
    assert len(done.turns[0].message.tool_calls) == 3


def test_a_step_that_truncates_is_truncation_not_termination():
    done = play(ScriptedPolicy([calls(call("fuel"))]), arena())
    assert done.stop_reason is StopReason.ENV_TRUNCATED
    assert (done.stop_reason.truncated, done.stop_reason.terminated) == (True, False)


def test_malformed_calls_are_told_counted_and_do_not_end_the_episode():
    done = play(ScriptedPolicy([calls(MALFORMED), "3"]), arena())
    assert done.stop_reason is StopReason.TERMINATED
    assert done.metrics["malformed_calls"] == 1 and done.metrics["tool_errors"] == 0
    assert "could not be read" in done.turns[0].feedback[0].text


def test_coerced_arguments_are_counted():
    done = play(ScriptedPolicy([calls(call("price", item=3)), "3"]), arena())
    assert done.metrics["coerced_arguments"] == 1
    assert done.metrics["tool_errors/raised"] == 1, "there is no item called 3, and the model is told"


def test_infos_that_are_numbers_become_metrics():
    done = play(ScriptedPolicy([calls(call("tip", amount=0.5)), "3"]), arena())
    assert done.metrics["info/tip"] == 0.5 and "info/note" not in done.metrics
    assert done.rewards["steps"].value == 1.5


# ---------------------------------------------------------------------------------------------------
# Limits


def test_turns_ran_out_after_a_tool_call_is_truncation():
    done = play(ScriptedPolicy([calls(call("price", item="tea"))] * 2), arena(limits={"max_turns": 2}))
    assert done.stop_reason is StopReason.MAX_TURNS and done.stop_reason.truncated
    assert len(done.turns) == 2 and done.turns[1].feedback[0].text == "3"
    assert done.reward == 0.0  # scored and kept, not left out


def test_an_answer_at_the_last_turn_is_an_answer():
    done = play(ScriptedPolicy(["3"]), arena(Answer, limits={"max_turns": 1}))
    assert done.stop_reason is StopReason.ANSWERED and done.stop_reason.terminated
    assert done.rewards == {"reward": Reward(value=0.5)}


def test_tool_calls_ran_out_in_the_middle_of_a_reply():
    reply = calls(call("price", item="tea"), call("price", item="jam"))
    done = play(ScriptedPolicy([reply, reply]), arena(limits={"max_tool_calls": 3}))
    assert done.stop_reason is StopReason.MAX_TOOL_CALLS and done.stop_reason.truncated
    assert Shop.opened[-1].log == ["tea", "jam", "tea"]
    assert done.metrics["skipped_calls"] == 1 and done.metrics["tool_calls"] == 3


def test_calls_of_later_turns_are_not_run_and_an_answer_is_heard():
    tea, jam = calls(call("price", item="tea")), calls(call("price", item="jam"))
    done = play(ScriptedPolicy([tea, tea, "3"]), arena(limits={"max_tool_turns": 2}))
    assert done.stop_reason is StopReason.TERMINATED and Shop.opened[-1].log == ["tea", "tea"]
    done = play(ScriptedPolicy([tea, tea, jam]), arena(limits={"max_tool_turns": 2}))
    assert done.stop_reason is StopReason.MAX_TOOL_CALLS and Shop.opened[-1].log == ["tea", "tea"]
    assert len(done.turns) == 3 and done.metrics["skipped_calls"] == 1


def test_an_answer_after_the_last_allowed_call_is_heard():
    done = play(ScriptedPolicy([calls(call("price", item="tea")), "3"]), arena(limits={"max_tool_calls": 1}))
    assert done.stop_reason is StopReason.TERMINATED and done.reward == 1.0


def test_seconds_ran_out_while_the_policy_thinks_is_scored_by_the_environment_and_kept():
    async def slow(context: Context) -> str:
        await asyncio.sleep(30 if context.turn else 0)
        return "look"

    class Two(Answer):
        def step(self, reply: str) -> Step:
            return Step("go on", reward=0.25)

    done = play(ScriptedPolicy(slow), arena(Two, limits={"seconds": 1.2}))
    assert done.stop_reason is StopReason.TIME_LIMIT and done.error is None
    assert len(done.turns) == 1
    assert done.rewards == {"steps": Reward(value=0.25), "reward": Reward(value=0.5)}


def test_seconds_run_out_for_those_who_never_wait():
    class Busy(Shop):
        max_turns = 200

        @tool
        def work(self) -> str:
            """Work on the event loop."""
            time.sleep(0.01)
            return "done"

    where = arena(Busy, limits={"seconds": 0.5})
    done = play(ScriptedPolicy(lambda context: calls(call("work"))), where)
    assert done.stop_reason is StopReason.TIME_LIMIT and 1 <= len(done.turns) < 100


def test_seconds_ran_out_in_an_async_tool_keeps_what_was_done():
    replies = [calls(call("tip", amount=0.5)), calls(call("price", item="tea"), call("wait", seconds=30))]
    done = play(ScriptedPolicy(replies), arena(limits={"seconds": 1.2}))
    assert done.stop_reason is StopReason.TIME_LIMIT
    assert [len(turn.tool_results) for turn in done.turns] == [1, 1]
    assert done.reward == 0.5


def test_a_tool_that_overruns_its_deadline_and_can_be_stopped_is_an_observation():
    replies = [calls(call("wait", seconds=30)), "3"]
    done = play(ScriptedPolicy(replies), arena(limits={"call_seconds": 0.5}))
    assert done.stop_reason is StopReason.TERMINATED and done.reward == 1.0
    assert done.metrics["tool_errors/timeout"] == 1


def test_a_policy_that_makes_a_tool_hang_is_truncated_scored_and_never_excluded():
    replies = [calls(call("run", seconds=0)), calls(call("run", seconds=3))]
    done = play(ScriptedPolicy(replies), arena(Blocking, limits={"call_seconds": 0.5}))
    assert done.stop_reason is StopReason.TIME_LIMIT
    assert (done.stop_reason.truncated, done.stop_reason.failed) == (True, False)
    assert done.rewards == {"steps": Reward(value=0.25)}, "the environment cannot be asked any more"
    assert done.metrics["tool_timeouts"] == 1
    assert done.error is not None and done.error.kind == "EnvHungError"


def test_a_hang_before_anything_was_paid_is_worth_nothing_and_still_scored():
    done = play(
        ScriptedPolicy([calls(call("run", seconds=3))]), arena(Blocking, limits={"call_seconds": 0.5})
    )
    assert done.rewards == {"steps": Reward(value=0.0)} and done.reward == 0.0


# ---------------------------------------------------------------------------------------------------
# Faults outside of the policy's control


class Unready(Env):
    inline = True

    def reset(self, task):
        raise RuntimeError("no such world")

    def reward(self):
        return 1.0


class SlowReset(Env):
    def reset(self, task):
        import time

        time.sleep(3)
        return "late"

    def reward(self):
        return 1.0


@pytest.mark.parametrize(
    ("env_class", "limits", "said"),
    [
        (Unready, {}, "RuntimeError: no such world"),
        (SlowReset, {"call_seconds": 0.5}, "did not return within 0.5 s"),
        (SlowReset, {"seconds": 0.5}, "the episode's 0.5 s ran out"),
    ],
)
def test_a_reset_that_fails_is_excluded_with_its_reason(env_class, limits, said):
    done = play(ScriptedPolicy(["hello"]), arena(env_class, limits=limits))
    assert done.stop_reason is StopReason.ENV_FAILED and done.stop_reason.failed
    assert done.reward is None and done.segments == ()
    assert said in done.error.message and done.error.where.endswith(": reset")


def test_a_lost_environment_is_excluded_and_what_was_done_is_kept():
    done = play(ScriptedPolicy([calls(call("tip", amount=1)), calls(call("lose"))]), arena())
    assert done.stop_reason is StopReason.ENV_FAILED and done.reward is None
    assert done.error.kind == "EnvLostError" and done.error.where == "environment shop: tool lose"
    assert [turn.reward for turn in done.turns] == [1.0, None]


@pytest.mark.parametrize(
    "problem",
    [EngineError("worker died"), PolicyError("no answer"), ZeroDivisionError("oops"), TimeoutError()],
)
def test_a_policy_that_fails_is_excluded(problem):
    def fail(context: Context) -> Reply:
        if context.turn == 0:
            return Reply(message=calls(call("price", item="tea")))
        raise problem

    done = play(ScriptedPolicy(fail), arena())
    assert done.stop_reason is StopReason.POLICY_FAILED and done.reward is None
    assert str(problem) in done.error.message and done.error.where == "policy script"
    assert len(done.turns) == 1


def test_a_teacher_that_is_missing_is_the_environments_fault():
    done = play(TeacherPolicy(), arena())
    assert done.stop_reason is StopReason.ENV_FAILED and "has no teacher" in done.error.message


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), "much", None])
def test_a_reward_that_is_no_finite_number_forfeits_the_episode(reward):
    class Odd(Answer):
        def reward(self):
            return reward

    done = play(ScriptedPolicy(["3"]), arena(Odd))
    assert done.stop_reason is StopReason.FORFEITED
    assert done.reward == 0.0 and done.rewards == {"steps": Reward(value=0.0)}
    assert "finite number" in done.error.message or "expected a number" in done.error.message
    assert done.turns[0].message.text == "3"


def test_a_step_reward_that_is_nan_forfeits_the_episode():
    class Odd(Shop):
        @tool
        def odd(self) -> Step:
            """Pay nonsense."""
            return Step("x", reward=float("nan"))

    done = play(ScriptedPolicy([calls(call("odd"))]), arena(Odd))
    assert done.stop_reason is StopReason.FORFEITED and done.reward == 0.0


def test_rewards_are_weighted_and_named():
    done = play(ScriptedPolicy(["3"]), arena(Answer, reward_weight=0.5), task={"reward": {"a": 1, "b": 3}})
    assert done.rewards == {"a": Reward(value=1.0, weight=0.5), "b": Reward(value=3.0, weight=0.5)}
    assert done.reward == 2.0


@pytest.mark.parametrize("name", ["steps", "forfeit"])
def test_the_names_of_our_own_rewards_are_kept_for_them(name):
    class Both(Shop):
        def reward(self):
            return {name: 1.0}

    done = play(ScriptedPolicy(["3"]), arena(Both))
    assert done.stop_reason is StopReason.FORFEITED and "use another name" in done.error.message


# ---------------------------------------------------------------------------------------------------
# The rest of an episode's life


def test_a_cancelled_episode_reaches_the_sink_once_with_what_was_done():
    where, seen, waits = arena(), [], asyncio.Event()

    async def stuck(context: Context) -> Message:
        if context.turn:
            waits.set()
            await asyncio.sleep(30)
        return calls(call("tip", amount=1))

    async def main() -> None:
        task = asyncio.ensure_future(
            play_episode(
                order(), arena=where, policy=ScriptedPolicy(stuck), sampling=Sampling(), sink=seen.append
            )
        )
        await waits.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await where.aclose()

    asyncio.run(main())
    [done] = seen
    assert done.stop_reason is StopReason.CANCELLED and done.stop_reason.failed
    assert len(done.turns) == 1 and done.reward is None
    assert Shop.opened[-1].closed


def test_environments_are_used_again_and_broken_ones_replaced_and_all_are_closed():
    where, before = arena(), len(Shop.opened)

    async def main() -> list[Trajectory]:
        out = []
        for k, reply in enumerate(["3", "3", calls(call("lose")), "3", "3"]):
            out.append(
                await play_episode(
                    order(f"t/0/s{k}"),
                    arena=where,
                    policy=ScriptedPolicy([reply]),
                    sampling=Sampling(),
                    sink=lambda one: None,
                )
            )
        await where.aclose()
        return out

    played = asyncio.run(main())
    assert [one.stop_reason.failed for one in played] == [False, False, True, False, False]
    opened = Shop.opened[before:]
    assert len(opened) == 2 and all(one.closed for one in opened)


def test_a_release_that_raises_loses_nothing(caplog):
    class Clumsy(ScriptedPolicy):
        async def release(self, session: str) -> None:
            raise KeyError(session)

    done = play(Clumsy(["3"]), arena())
    assert done.stop_reason is StopReason.TERMINATED and "release of t/0/s0" in caplog.text


def test_a_defect_reaches_the_sink_and_goes_on_as_what_it_is():
    class Broken(ScriptedPolicy):
        async def act(self, context: Context) -> Reply:
            return None

    seen: list[Trajectory] = []
    with pytest.raises(AttributeError):
        asyncio.run(
            play_episode(order(), arena=arena(), policy=Broken([]), sampling=Sampling(), sink=seen.append)
        )
    [done] = seen
    assert done.stop_reason is StopReason.CANCELLED and done.error.kind == "AttributeError"


def test_what_the_policy_sees():
    contexts: list[Context] = []

    def watch(context: Context) -> Message | str:
        contexts.append(context)
        return calls(call("look")) if context.turn == 0 else "3"

    class Spoken(Answer):
        system = "Be brief."

    done = play(ScriptedPolicy(watch), arena(Spoken), sampling=Sampling(max_tokens=9))
    first, second = contexts
    assert [message.role for message in first.messages] == ["system", "user"]
    assert first.new_messages == first.messages
    assert [message.role for message in second.messages] == ["system", "user", "assistant", "tool"]
    assert [message.text for message in second.new_messages] == ["3"]
    assert [one.name for one in first.tools] == ["look"] == [one.name for one in done.tools]
    assert first.session == second.session == "t/0/s0" and (first.turn, second.turn) == (0, 1)
    assert first.sampling.max_tokens == 9
    assert [turn.state_key for turn in done.turns] == ["only", "only"]


def test_each_turn_has_a_seed_of_its_own_the_same_in_every_run():
    def seeds(sibling: int, base: int | None = None, group: int = 7) -> list[int]:
        out: list[int] = []

        def watch(context: Context) -> Message | str:
            out.append(context.sampling.seed)
            return calls(call("look")) if context.turn == 0 else "3"

        where = arena(Answer)
        asyncio.run(
            play_episode(
                order(f"t/0/s{sibling}", env="answer", seed=group, sibling=sibling),
                arena=where,
                policy=ScriptedPolicy(watch),
                sampling=Sampling(seed=base),
                sink=lambda one: None,
            )
        )
        return out

    assert seeds(0) == seeds(0)
    assert len({*seeds(0), *seeds(1), *seeds(0, base=1), *seeds(0, group=8)}) == 8


def test_a_step_that_says_nothing_still_lets_the_policy_speak():
    class Quiet(Env):
        inline = True

        def reset(self, task):
            self.left = 1
            return "go"

        def step(self, reply):
            self.left -= 1
            return Step("", terminated=self.left < 0)

    done = play(ScriptedPolicy(["a", "b"]), arena(Quiet))
    assert [turn.feedback for turn in done.turns] == [(Message.user(""),), ()]


def test_a_teacher_plays_from_private_state():
    done = play(TeacherPolicy(), arena(Answer))
    assert done.turns[0].message.text == "the answer after 1" and done.policy == "teacher"
    assert done.sampling is None and done.turns[0].ids is None


def test_an_environment_error_is_no_policy_error_whoever_raises_it():
    def fail(context: Context) -> Reply:
        raise EnvError("the teacher's server is gone")

    assert play(ScriptedPolicy(fail), arena()).stop_reason is StopReason.ENV_FAILED


def test_a_reward_of_none_leaves_the_episode_out_and_is_never_a_zero():
    done = play(ScriptedPolicy(["3"]), arena(Answer), task={"reward": {"judge": None}})
    assert done.stop_reason is StopReason.ANSWERED
    assert done.rewards == {"judge": Reward(value=None)} and done.reward is None
    part = play(ScriptedPolicy(["3"]), arena(Answer), task={"reward": {"judge": None, "form": 0.25}})
    assert part.reward == 0.25


def test_what_a_policy_can_write_never_excuses_its_episode():
    class Count(Env):
        inline = True

        def reset(self, task):
            return "Count."

        @tool
        def count(self, to: int) -> str:
            """Count."""
            return "counted"

    done = play(ScriptedPolicy([calls(call("count", to=10**400)), "done"]), arena(Count))
    assert done.stop_reason is StopReason.ANSWERED and done.reward == 0.0
    assert done.turns[0].tool_results[0].error is None
