"""Scripts, people, baselines; routing; the harness hash (promise 11); the error budget; `play_all`."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from contextlib import aclosing

import pytest
from tests.support.rollouts import Answer, Shop, arena, call, calls, order, play

from turnwise.config import EnvConfig, LimitsConfig
from turnwise.envs.baselines import baselines
from turnwise.envs.library.catch import Catch
from turnwise.envs.registry import make
from turnwise.envs.session import Limits
from turnwise.errors import TaskError, TooManyFailuresError
from turnwise.rollout.arena import Arena, route
from turnwise.rollout.harness import harness_hash, overlay_limits
from turnwise.rollout.play import play_all
from turnwise.rollout.policies import BaselinePolicy, PersonPolicy, ScriptedPolicy, TeacherPolicy
from turnwise.types import Message, Sampling, StopReason


def test_a_script_that_runs_out_is_an_error_of_the_policy():
    done = play(ScriptedPolicy([calls(call("price", item="tea"))]), arena())
    assert done.stop_reason is StopReason.POLICY_FAILED and "ended after 1 replies" in done.error.message


def test_a_person_is_asked_on_another_thread_or_on_the_loop():
    threads = []

    def ask(context):
        threads.append(threading.current_thread())
        return "3"

    async def ask_async(context):
        return Message.assistant("3")

    for policy in (PersonPolicy(ask), PersonPolicy(ask_async)):
        done = play(policy, arena())
        assert done.stop_reason is StopReason.TERMINATED and done.policy == "person"
    assert threads[0] is not threading.main_thread()


def test_a_prompt_that_was_closed_is_an_error_of_the_policy():
    def ask(context):
        raise EOFError

    assert play(PersonPolicy(ask), arena()).error.message.startswith("the person's prompt: EOFError")


def test_baselines_play_by_chance_that_is_the_same_in_every_run():
    found = baselines(Catch(rows=5, columns=5))
    where = arena("catch", name="catch")
    games = [
        play(BaselinePolicy("random", found["random"]), where, task={"column": 1, "seed": 0}) for _ in "ab"
    ]
    assert games[0].policy == "baseline:random" and len(games[0].turns) == 9
    moves = [[turn.message.tool_calls[0].arguments["direction"] for turn in game.turns] for game in games]
    assert moves[0] == moves[1] and len(set(moves[0])) > 1
    still = play(BaselinePolicy("constant", found["constant"]), where, task={"column": 2, "seed": 0})
    assert still.reward == 1.0


# ---------------------------------------------------------------------------------------------------
# Routing


def test_a_row_is_routed_by_its_environment_column():
    known = ["catch", "chain_sum"]
    assert route({"environment": "catch"}, known) == "catch"
    assert route({}, ["catch"]) == "catch"
    with pytest.raises(TaskError, match=r"'chainsum'.*did you mean 'chain_sum'\? known: catch, chain_sum"):
        route({"environment": "chainsum"}, known)
    with pytest.raises(TaskError, match=r"names the environment \['catch'\], which the run does not have"):
        route({"environment": ["catch"]}, dict.fromkeys(known))
    with pytest.raises(TaskError, match="names no environment; set its 'environment' column"):
        route({"text": "hi"}, known)


# ---------------------------------------------------------------------------------------------------
# The harness


def hashed(**changes):
    parts = {"renderer": "r", "environment": "e", "limits": Limits(max_turns=3), "rewards": {"f": 1.0}}
    return harness_hash(**{**parts, **changes})


def test_promise_11_the_harness_hash_is_the_same_for_the_same_harness_and_no_other():
    others = [
        hashed(),
        hashed(renderer="other"),
        hashed(environment="other"),
        hashed(limits=Limits(max_turns=4)),
        hashed(rewards={"f": 2.0}),
        hashed(rewards={}),
    ]
    assert len(set(others)) == len(others) and hashed() == hashed()
    assert len(hashed()) == 12 and int(hashed(), 16) >= 0


def test_the_hash_is_on_every_trajectory_whoever_plays():
    where = arena(Answer, renderer="r")
    played = [play(policy, where) for policy in (ScriptedPolicy(["3"]), TeacherPolicy(), ScriptedPolicy([]))]
    assert {one.harness for one in played} == {where.harness}
    assert arena(Answer, renderer="other").harness != where.harness


def test_a_recipes_limits_are_laid_over_the_environments_own():
    own = Limits(max_turns=5, seconds=60.0, call_seconds=7.0)
    assert overlay_limits(own, LimitsConfig()) == own
    assert overlay_limits(own, LimitsConfig(max_turns=2, max_context=99)) == Limits(
        max_turns=2, max_context=99, seconds=60.0, call_seconds=7.0
    )


def test_an_arena_as_a_recipe_configures_it():
    config = EnvConfig(
        limits=LimitsConfig(max_turns=2),
        rewards={"tests.rollout.test_policies:brevity": 0.5},
        reward_weight=2.0,
        max_excluded=0.1,
    )
    made = Arena.of("answer", make(Answer, name="answer"), config, renderer="r")
    assert made.limits.max_turns == 2 and made.reward_weight == 2.0 and made.max_excluded == 0.1
    [function] = made.functions
    assert (function.name, function.weight, function.function) == ("brevity", 0.5, brevity)


def brevity(completions, **columns):
    return [-float(len(messages)) for messages in completions]


# ---------------------------------------------------------------------------------------------------
# play_all


def everything(orders, policy=None, arenas=None, take=None, **options):
    seen, out = [], []

    async def main():
        playing = play_all(
            orders,
            arenas=arenas or {"answer": arena(Answer), "shop": arena()},
            policy=policy or ScriptedPolicy(["3"]),
            sampling=Sampling(),
            sink=seen.append,
            **options,
        )
        async with asyncio.timeout(120), aclosing(playing):
            async for one in playing:
                out.append(one)
                if len(out) == take:
                    break

    asyncio.run(main())
    return out, seen


def orders(count, env="answer"):
    return [order(f"{env}/{n}/s0", env=env, seed=n) for n in range(count)]


def test_play_all_yields_each_once_as_it_ends_within_its_bounds():
    running, chance = [0, 0], random.Random(0)
    full = asyncio.Event()

    async def wait(context):
        running[0] += 1
        running[1] = max(running)
        if running[0] == 7:
            full.set()
        await asyncio.wait_for(full.wait(), 60)
        await asyncio.sleep(chance.random() / 500)
        running[0] -= 1
        return "3"

    mixed = [*orders(20), *orders(20, "shop")]
    out, seen = everything(mixed, ScriptedPolicy(wait), concurrency=7)
    assert out == seen and Counter(one.id for one in out) == Counter(one.id for one in mixed)
    assert running[1] == 7
    assert Counter(one.reward for one in out) == {0.5: 20, 1.0: 20}


def test_only_an_environments_own_tools_are_in_its_prompt():
    seen = {}

    def watch(context):
        seen[context.session.partition("/")[0]] = [one.name for one in context.tools]
        return "3"

    everything([*orders(1), *orders(1, "shop")], ScriptedPolicy(watch))
    assert seen == {"answer": ["look"], "shop": ["price", "buy", "tip", "fuel", "lose", "wait"]}


def test_play_all_refuses_what_it_cannot_play_before_it_plays_anything():
    with pytest.raises(TaskError, match=r"unknown environments \['chess'\]"):
        everything([*orders(1), *orders(1, "chess")])
    with pytest.raises(TaskError, match="same id"):
        everything([*orders(1), *orders(1)])
    assert everything([]) == ([], [])


def test_leaving_play_all_early_cancels_the_rest_and_closes_the_environments():
    async def some_wait(context):
        if not context.session.endswith("/0/s0"):
            await asyncio.sleep(60)
        return "3"

    before = len(Shop.opened)
    out, seen = everything(orders(5, "shop"), ScriptedPolicy(some_wait), take=1)
    assert [one.id for one in out] == ["shop/0/s0"]
    assert Counter(one.stop_reason for one in seen) == {StopReason.TERMINATED: 1, StopReason.CANCELLED: 4}
    opened = Shop.opened[before:]
    assert 4 <= len(opened) <= 5 and all(one.closed for one in opened)


def test_play_all_stops_when_nothing_succeeds():
    with pytest.raises(TooManyFailuresError, match=r"8 episodes failed in a row; .*the script ended"):
        everything(orders(200), ScriptedPolicy([]), concurrency=4, max_failures=8)


def test_play_all_scores_by_functions_too():
    config = EnvConfig(rewards={"tests.rollout.test_policies:brevity": 0.5})
    where = Arena.of("answer", make(Answer, name="answer"), config)
    out, seen = everything(orders(2), arenas={"answer": where})
    assert [one.reward for one in out] == [0.0, 0.0] and len(seen) == 2
