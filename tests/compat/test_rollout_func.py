"""`rollout_func`: called as TRL calls it, its tokens learned from as anybody's, its mistakes told."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from tests.compat import trainers
from tests.support.rollouts import renderer
from turnwise.compat.environments import environments
from turnwise.compat.generation import generate_rollout_completions
from turnwise.compat.rewards import Board, reward_functions
from turnwise.compat.rollout_func import player
from turnwise.compat.rollouts import read_rollouts
from turnwise.engines.scripted import ScriptedEngine
from turnwise.errors import PolicyError, RecipeError, RolloutError, TaskError, TooManyFailuresError
from turnwise.learn.samples import rl_samples
from turnwise.rollout.arena import Arena
from turnwise.rollout.group import GroupOrder
from turnwise.rollout.policies import ModelPolicy
from turnwise.store import RunDir
from turnwise.types import Message, Sampling, StopReason, Trajectory, TrajectoryGroup

END = renderer().stop_ids[0]
ROWS = [{"prompt": [{"role": "user", "content": f"Row {n}."}], "n": n} for n in range(3)]


class Trainer:
    """Whatever a script looks at."""

    processing_class = renderer().tokenizer


def ids_of(text: str) -> list[int]:
    return list(renderer().tokenizer(text)["input_ids"])


def answering(prompts: Sequence[Any], **extra: Any) -> dict[str, Any]:
    """Two tokens and the end, for each prompt."""
    return {
        "prompt_ids": [[5, 6]] * len(prompts),
        "completion_ids": [[7, 8, END]] * len(prompts),
        "logprobs": [[-0.1, -0.2, -0.3]] * len(prompts),
        **extra,
    }


def play(
    rollout_func: Callable[..., Any],
    reward_funcs: Any = lambda completions, **_: [0.5] * len(completions),
    *,
    rows: Sequence[Mapping[str, Any]] = ROWS,
    size: int = 2,
    steps: int = 1,
    finished: Callable[[str], tuple[Trajectory, ...]] | None = None,
    engine: ScriptedEngine | None = None,
    board: Board | None = None,
    form: Any = "rollout",
    sink: Callable[[Trajectory], None] | None = None,
    **options: Any,
) -> tuple[list[list[TrajectoryGroup]], list[Trajectory]]:
    """Steps of one group of each row, and what the sink got."""
    [(name, spec)] = environments(rollout_func=rollout_func).items()
    functions = reward_functions(
        reward_funcs, weights=None, board=board or Board(), processing=renderer().tokenizer, form=form
    )
    arena = Arena(name, spec, functions=functions)
    policy = ModelPolicy(engine or ScriptedEngine(lambda made: [9, 10, END]), renderer())
    seen: list[Trajectory] = []

    def source(env: str, index: int) -> GroupOrder:
        row = rows[index % len(rows)]
        return GroupOrder(id=f"rl/{env}/{index}", env=env, task=row, seed=index, size=size)

    async def main() -> list[list[TrajectoryGroup]]:
        make = player(rollout_func, Trainer())
        found = []
        async with make(
            arenas={name: arena},
            policy=policy,
            sampling=Sampling(max_tokens=16, seed=0),
            source=source,
            groups_per_step={name: len(rows)},
            sink=sink or seen.append,
            finished=finished,
            **options,
        ) as playing:
            for step in range(steps):
                found.append(await playing.next_step())
                playing.advance(step + 1)
        return found

    return asyncio.run(main()), seen


# -- the call ------------------------------------------------------------------------------------------


def test_it_is_called_once_a_step_with_each_prompt_as_often_as_there_are_siblings():
    """TRL 1.16 calls `_generate` with its sampler's repeated rows, whatever its docstring says."""
    asked = []

    def rollout_func(prompts, trainer):
        asked.append((prompts, trainer, threading.current_thread()))
        prompts[0][0]["content"] = "changed"  # Its own copy.
        return answering(prompts)

    [first, second], seen = play(rollout_func, steps=2)
    assert len(asked) == 2 and len(seen) == 12
    for prompts, trainer, thread in asked:
        assert isinstance(trainer, Trainer) and thread is not threading.main_thread()
        assert [prompt[0]["content"] for prompt in prompts] == [
            "changed", "Row 0.", "Row 1.", "Row 1.", "Row 2.", "Row 2.",
        ]  # fmt: skip
    assert [group.id for group in first] == ["rl/prompts/0", "rl/prompts/1", "rl/prompts/2"]
    assert [group.task["prompt"][0]["content"] for group in second] == ["Row 0.", "Row 1.", "Row 2."]
    assert sorted(one.id for one in seen) == sorted(
        one.id for groups in (first, second) for group in groups for one in group.trajectories
    )


def test_async_functions_and_callable_objects():
    class Later:
        async def __call__(self, prompts, trainer):
            await asyncio.sleep(0)
            return answering(prompts)

    async def later(prompts, trainer):
        await asyncio.sleep(0)
        return answering(prompts)

    for function in (later, Later()):
        [[group, *_]], _ = play(function)
        assert [one.reward for one in group.trajectories] == [0.5, 0.5]


# -- tokens --------------------------------------------------------------------------------------------


def test_the_mask_cuts_a_completion_into_turns_and_loss_falls_on_the_models_tokens_alone():
    made = [7, 8, END, 20, 21, 22, 11, END]
    mask = [1, 1, 1, 0, 0, 0, 1, 1]
    logprobs = [-0.1, -0.2, -0.3, 0.0, None, 0.0, -0.4, -0.5]

    def rollout_func(prompts, trainer):
        count = len(prompts)
        return {
            "prompt_ids": [[5, 6]] * count,
            "completion_ids": [made] * count,
            "logprobs": [logprobs] * count,
            "env_mask": [mask] * count,
        }

    [[group, *_]], _ = play(rollout_func)
    [trajectory, _] = group.trajectories
    [segment] = trajectory.segments
    first, second = segment.turns
    assert (first.context_ids, first.ids, first.logprobs) == ([5, 6], [7, 8, END], [-0.1, -0.2, -0.3])
    assert (second.context_ids, second.ids, second.logprobs) == ([20, 21, 22], [11, END], [-0.4, -0.5])
    assert first.feedback == (Message.user(renderer().decode([20, 21, 22])),)
    assert first.versions == [0, 0, 0] and trajectory.sampled_tokens == 5
    [sample] = rl_samples(trajectory, (1.0, 1.0))
    assert sample.token_ids_T.tolist() == [5, 6, *made]
    assert sample.loss_mask_T.tolist() == [False, False, *map(bool, mask)]
    assert sample.logprobs_T.tolist() == pytest.approx([0, 0, -0.1, -0.2, -0.3, 0, 0, 0, -0.4, -0.5])


def test_a_mask_may_begin_and_end_with_what_others_wrote():
    def rollout_func(prompts, trainer):
        return answering(prompts, env_mask=[[0, 1, 0]] * len(prompts))

    seen = []

    def watch(completion_ids, completions, **_):
        seen.extend(zip(completion_ids, completions, strict=True))
        return [1.0] * len(completions)

    [[group, *_]], _ = play(rollout_func, watch)
    [turn] = group.trajectories[0].turns
    assert (turn.context_ids, turn.ids, turn.logprobs) == ([5, 6, 7], [8], [-0.2])
    assert group.trajectories[0].stop_reason is StopReason.CUT_REPLY, "its last token ends nothing"
    # Reward functions see all of it, as one message, as TRL decodes it.
    text = renderer().tokenizer.decode([7, 8, END], skip_special_tokens=True)
    assert seen[0] == ([7, 8, END], [{"role": "assistant", "content": text}])


@pytest.mark.parametrize(
    ("ids", "reason"),
    [([7, 8, END], StopReason.ANSWERED), ([7, 8, 9], StopReason.CUT_REPLY)],
)
def test_a_completion_without_an_end_is_truncated(ids, reason):
    def rollout_func(prompts, trainer):
        return answering(prompts, completion_ids=[ids] * len(prompts))

    [[group, *_]], _ = play(rollout_func)
    assert {one.stop_reason for one in group.trajectories} == {reason}
    assert {one.stop_reason.truncated for one in group.trajectories} == {reason is StopReason.CUT_REPLY}


def test_log_probabilities_of_the_most_probable_tokens_as_vllms_client_nests_them():
    nested = [[[-0.1], [-0.2], [-0.3]]]
    assert read_rollouts({"prompt_ids": [[5]], "completion_ids": [[7, 8, 9]], "logprobs": nested}, 1)[
        0
    ].parts == (([7, 8, 9], [-0.1, -0.2, -0.3]),)
    # Of several the sampled token's own, which need not be the first.
    several = {"prompt_ids": [[5]], "completion_ids": [[7, 8]], "logprobs": [[[-0.1, -2.0], [-0.2, -3.0]]]}
    [read] = read_rollouts({**several, "logprob_token_ids": [[[1, 7], [8, 2]]]}, 1)
    assert read.parts == (([7, 8], [-2.0, -0.2]),)
    with pytest.raises(RolloutError, match=r"logprobs\[0\]\[0\] has 2 entries"):
        read_rollouts(several, 1)


def test_tensors_and_arrays_are_lists_too():
    [read] = read_rollouts(
        {
            "prompt_ids": torch.tensor([[5, 6]]),
            "completion_ids": [np.array([7, 8])],
            "logprobs": np.array([[-0.5, -0.25]]),
            "env_mask": [torch.tensor([1, 0])],
        },
        1,
    )
    assert read.parts == (([7], [-0.5]), ([8], None)) and read.prompt_ids == [5, 6]


def test_scalars_of_numpy_and_torch_are_numbers():
    answer = {
        "prompt_ids": [[torch.tensor(5), 6]],
        "completion_ids": [[np.int64(7), torch.tensor(8), 9]],
        "logprobs": [[np.float32(-0.5), torch.tensor(-0.25), [np.float64(-1.0)]]],
        "env_mask": [[np.bool_(True), torch.tensor(1), True]],
    }
    [read] = read_rollouts(answer, 1)
    assert read.prompt_ids == [5, 6] and read.parts == (([7, 8, 9], [-0.5, -0.25, -1.0]),)
    assert {type(one) for one in read.columns["completion_ids"]} == {int}
    with pytest.raises(RolloutError, match=r"completion_ids\[0\]: expected token ids"):
        read_rollouts({**answer, "completion_ids": [[np.float32(7), 8, 9]]}, 1)


def test_logprobs_that_are_not_given_are_the_learners_own(tmp_path, caplog):
    """As in TRL, which takes the sampler's weights for the present ones then; env_mask cuts as ever."""
    true: list[list[float]] = []
    said = ids_of("more")

    def rollout_func(prompts, trainer):
        rows: dict[str, Any] = {"prompt_ids": [], "completion_ids": [], "logprobs": None, "env_mask": []}
        for one in generate_rollout_completions(trainer, prompts):
            rows["prompt_ids"].append(one["prompt_ids"])
            rows["completion_ids"].append([*one["completion_ids"], *said])
            rows["env_mask"].append([1] * len(one["completion_ids"]) + [0] * len(said))
            true.append(one["logprobs"])
        return rows

    made = trainers.trainer(
        tmp_path, rollout_func=rollout_func, max_steps=2, bf16=False, temperature=0.7,
        eval_dataset=trainers.ROWS[:1],
    )  # fmt: skip
    made.train()
    told = {one.id: one for one in RunDir(tmp_path).read("rl")}
    found = [list(one.turns[0].logprobs) for one in told.values()]
    assert len(found) == 16 and len(true) == 16
    near = [
        min((np.abs(np.subtract(own, one)).max() for one in true if len(one) == len(own)), default=1.0)
        for own in found
    ]
    assert max(near) < 1e-4, "as it was drawn with, at its temperature, by the weights of its step"
    assert caplog.text.count("returned no logprobs") == 1
    made.evaluate()
    assert logged(made, "eval_reward")


# -- rewards -------------------------------------------------------------------------------------------


def test_further_fields_reach_the_reward_functions_row_by_row():
    asked = []

    def rollout_func(prompts, trainer):
        return answering(prompts, score=[float(n) for n in range(len(prompts))], note="for all")

    def reward(prompts, score, note, n, log_extra, **_):
        asked.append((prompts[0][0]["content"], score, note, n))
        log_extra("score", score)
        return score

    board = Board()
    [groups], _ = play(rollout_func, reward, board=board)
    assert sorted(asked) == [(f"Row {n}.", [2.0 * n, 2.0 * n + 1], ["for all"] * 2, [n, n]) for n in range(3)]
    assert [[one.reward for one in group.trajectories] for group in groups] == [[0, 1], [2, 3], [4, 5]]
    ids = [one.id for group in groups for one in group.trajectories]
    assert board.take_columns(ids) == {"score": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]}


def test_plain_prompts_stay_text():
    asked = []

    def rollout_func(prompts, trainer):
        asked.extend(prompts)
        return answering(prompts)

    def reward(prompts, completions, **_):
        asked.append((prompts, completions))
        return [0.0] * len(prompts)

    play(rollout_func, reward, rows=[{"prompt": "Once"}])
    text = renderer().tokenizer.decode([7, 8, END], skip_special_tokens=True)
    assert asked == ["Once", "Once", (["Once", "Once"], [text, text])]


# -- resuming and failing ------------------------------------------------------------------------------


def test_a_group_that_was_begun_is_only_completed():
    [[whole, *_]], _ = play(lambda prompts, trainer: answering(prompts))
    kept = whole.trajectories[1]
    asked = []

    def rollout_func(prompts, trainer):
        asked.append([prompt[0]["content"] for prompt in prompts])
        return answering(prompts)

    def finished(group: str) -> tuple[Trajectory, ...]:
        return (kept,) if group == kept.group_id else ()

    [[group, *_]], seen = play(rollout_func, finished=finished)
    assert asked == [["Row 0.", "Row 1.", "Row 1.", "Row 2.", "Row 2."]]
    assert group.trajectories[1] is kept and kept.id not in {one.id for one in seen}


def test_a_call_that_raises_is_made_again():
    calls = []

    def rollout_func(prompts, trainer):
        calls.append(len(prompts))
        if len(calls) == 1:
            raise ConnectionError("the game server is restarting")
        return answering(prompts)

    [groups], seen = play(rollout_func)
    assert calls == [6, 6] and [group.id for group in groups] == [f"rl/prompts/{n}~1" for n in range(3)]
    failed = [one for one in seen if one.stop_reason is StopReason.POLICY_FAILED]
    assert len(failed) == 6 and "game server is restarting" in failed[0].error.message


@pytest.mark.parametrize(("error", "ends"), [(KeyError, False), (TypeError, True), (AttributeError, True)])
def test_one_that_has_played_before_is_stopped_by_mistakes_in_its_code_alone(error, ends):
    calls = []

    def rollout_func(prompts, trainer):
        calls.append(len(prompts))
        if len(calls) == 2:
            raise error("observation")
        return answering(prompts)

    if ends:
        with pytest.raises(error, match="observation"):
            play(rollout_func, steps=2)
    else:
        [_, groups], _ = play(rollout_func, steps=2)
        assert [group.id for group in groups] == [f"rl/prompts/{n}~1" for n in (3, 4, 5)]
    assert calls == [6] * (2 if ends else 3)


def test_a_first_call_that_raises_ends_the_run_by_its_own_error():
    seen: list[Trajectory] = []

    def rollout_func(prompts, trainer):
        raise KeyError("observation")

    with pytest.raises(KeyError, match="observation") as caught:
        play(rollout_func, sink=seen.append)
    assert caught.traceback[-1].name == "rollout_func" and len(seen) == 6


def test_one_that_never_reaches_its_network_stops_the_run_with_what_it_said():
    def rollout_func(prompts, trainer):
        raise ConnectionError("no route")

    with pytest.raises(TooManyFailuresError, match=r"ConnectionError.*no route"):
        play(rollout_func, max_failures=12)


def test_one_that_is_called_otherwise_is_refused_when_the_trainer_is_made(tmp_path):
    def earlier(prompts, args, processing_class):
        return {}

    with pytest.raises(
        RecipeError, match=r"rollout_func\(prompts, trainer\), and missing.*takes \(prompts, args"
    ):
        trainers.trainer(tmp_path, rollout_func=earlier)
    with pytest.raises(TaskError, match=r"row 0: it has no 'prompt', only question"):
        trainers.trainer(
            tmp_path, rollout_func=lambda prompts, trainer: {}, train_dataset=[{"question": "x"}] * 4
        )


def test_it_is_never_called_twice_at_a_time():
    inside, most, calls = [0], [0], [0]

    def rollout_func(prompts, trainer):
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        calls[0] += 1
        time.sleep(0.05)
        inside[0] -= 1
        return answering(prompts, score=[calls[0]] * len(prompts))

    async def slow(score, completions, n, **_):
        await asyncio.sleep(0.02 * n[0])  # Groups of one call are scored at different times.
        return [float(score[0])] * len(completions)

    seen: list[TrajectoryGroup] = []

    def useful(group: TrajectoryGroup) -> bool:
        seen.append(group)
        return len(seen) > 3

    play(rollout_func, slow, useful=useful, refill_limit=3)
    assert most == [1] and calls[0] >= 2


@pytest.mark.parametrize("sync", [True, False])
def test_leaving_ends_the_call_and_every_episode_reaches_the_sink(sync):
    began, left = threading.Event(), threading.Event()
    errors: list[BaseException] = []

    def blocking(prompts, trainer):
        began.set()
        left.wait(10)
        try:
            generate_rollout_completions(trainer, [ROWS[0]["prompt"]])
        except PolicyError as error:
            errors.append(error)
        return answering(prompts)

    async def waiting(prompts, trainer):
        began.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError as error:
            errors.append(error)
            raise

    seen: list[Trajectory] = []
    rollout_func = blocking if sync else waiting
    [(name, spec)] = environments(rollout_func=rollout_func).items()

    async def main():
        policy = ModelPolicy(ScriptedEngine(lambda made: [END]), renderer())
        async with player(rollout_func, Trainer())(
            arenas={name: Arena(name, spec)},
            policy=policy,
            sampling=Sampling(),
            source=lambda env, n: GroupOrder(id=f"rl/{n}", env=env, task=ROWS[0], seed=0, size=2),
            groups_per_step={name: 2},
            sink=seen.append,
        ) as playing:
            step = asyncio.ensure_future(playing.next_step())
            await asyncio.to_thread(began.wait, 10)
            step.cancel()
        left.set()

    asyncio.run(main())
    for _ in range(1000):
        if errors:
            break
        time.sleep(0.01)
    assert len(errors) == 1, "nothing samples for a run that is over"
    assert sorted(one.id for one in seen) == ["rl/0/s0", "rl/0/s1", "rl/1/s0", "rl/1/s1"]
    assert {one.stop_reason for one in seen} == {StopReason.CANCELLED}


def test_staleness_and_rows_without_a_prompt_are_refused():
    with pytest.raises(RecipeError, match="a rollout_func says nothing of the weights"):
        play(lambda prompts, trainer: answering(prompts), staleness=1)
    with pytest.raises(TaskError, match="the row has no 'prompt'"):
        play(lambda prompts, trainer: answering(prompts), rows=[{"question": "?"}])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prompt_ids": None},
            "returned no prompt_ids; it must return prompt_ids, completion_ids and logprobs",
        ),
        ({"completion_ids": [[7, 8, END]]}, "returned 1 completion_ids for 2 prompts; prompts come repeated"),
        ({"completion_ids": [[7, 8, END], []]}, r"completion_ids\[1\]: expected token ids.*found nothing"),
        ({"prompt_ids": [[5], [5.5]]}, r"prompt_ids\[1\]: expected token ids.*5\.5"),
        ({"completion_ids": "text"}, "completion_ids as str; expected a list"),
        ({"logprobs": [[-0.1, -0.2, -0.3], [-0.1]]}, r"logprobs\[1\] has 1 entries for 3 completion_ids"),
        ({"logprobs": [[-0.1, -0.2, -0.3], [-0.1, None, 0]]}, r"logprobs\[1\]\[1\] is None"),
        ({"logprobs": [[-0.1, float("nan"), -0.3]] * 2}, r"logprobs\[0\]\[1\] is nan"),
        ({"logprobs": [[[-0.1], [-0.2, -0.3], [-1.0]]] * 2}, r"logprobs\[0\]\[1\] has 2 entries"),
        ({"env_mask": [[1, 1, 1], [1, 1]]}, r"env_mask\[1\] has 2 entries for 3"),
        ({"env_mask": [[1, 1, 1], [1, 2, 1]]}, r"env_mask\[1\]\[1\] is 2"),
        ({"env_mask": [[1, 1, 1], [0, 0, 0]]}, "completion 1 has no token of the model"),
        ({"score": [1.0]}, "returned 1 score for 2 prompts"),
        ({"completions": ["a", "b"]}, "'completions', which reward functions have already"),
    ],
)
def test_what_is_wrong_with_an_answer_is_said_with_its_place(changes, message):
    with pytest.raises(RolloutError, match=message):
        read_rollouts(answering([0, 1], **changes), 2)


def test_an_answer_of_the_wrong_form_stops_the_run_and_loses_no_episode():
    seen: list[Trajectory] = []
    with pytest.raises(RolloutError, match="returned list; expected a dict"):
        play(lambda prompts, trainer: [prompts], sink=seen.append)
    assert len(seen) == 6 and {one.stop_reason for one in seen} == {StopReason.CANCELLED}


# -- generate_rollout_completions ----------------------------------------------------------------------


def test_completions_have_the_documented_form_and_may_be_handed_on():
    made = []

    def rollout_func(prompts, trainer):
        made[:] = generate_rollout_completions(trainer, prompts)
        return {key: [one[key] for one in made] for key in ("prompt_ids", "completion_ids", "logprobs")}

    engine = ScriptedEngine(lambda made: [*ids_of(f"said {made.number}"), END])
    [groups], _ = play(rollout_func, engine=engine)
    assert [set(one) for one in made] == [{"prompt_ids", "completion_ids", "logprobs", "text"}] * 6
    assert made[0]["prompt_ids"] == renderer().prompt([Message.user("Row 0.")]).ids
    assert [one["text"] for one in made] == [f"said {n}" for n in range(6)]
    assert [one.turns[0].message.text for group in groups for one in group.trajectories] == [
        f"said {n}" for n in range(6)
    ]
    assert len({made.sampling.seed for made in engine.calls}) == 6, "siblings are drawn apart"
    assert {made.sampling.max_tokens for made in engine.calls} == {16}


def test_a_conversation_of_several_turns_by_hand():
    """As TRL's Wordle guide does it: generate, play, append, with a mask."""

    def rollout_func(prompts, trainer):
        rows = {"prompt_ids": [], "completion_ids": [], "logprobs": [], "env_mask": [], "won": []}
        for prompt in prompts:
            text = trainer.processing_class.apply_chat_template(
                prompt, add_generation_prompt=True, tokenize=False
            )
            [first] = generate_rollout_completions(trainer, [text])
            feedback = ids_of("\n<|im_start|>user\nagain<|im_end|>\n<|im_start|>assistant\n")
            [second] = generate_rollout_completions(
                trainer, [text + first["text"] + "again"], generation_overrides={"max_tokens": 2}
            )
            rows["prompt_ids"].append(first["prompt_ids"])
            rows["completion_ids"].append(first["completion_ids"] + feedback + second["completion_ids"])
            rows["logprobs"].append(first["logprobs"] + [0.0] * len(feedback) + second["logprobs"])
            rows["env_mask"].append(
                [1] * len(first["completion_ids"]) + [0] * len(feedback) + [1] * len(second["completion_ids"])
            )
            rows["won"].append(1.0)
        return rows

    [[group, *_]], _ = play(rollout_func, lambda won, completions, **_: won)
    trajectory = group.trajectories[0]
    assert trajectory.turns[0].context_ids == renderer().prompt([Message.user("Row 0.")]).ids, (
        "text that the template rendered is read as the template's own tokens"
    )
    assert [turn.ids for turn in trajectory.turns] == [[9, 10, END], [9, 10]]
    assert "again" in trajectory.turns[0].feedback[0].text and trajectory.reward == 1.0
    assert trajectory.stop_reason is StopReason.CUT_REPLY


def test_overrides_and_chats():
    seen = {}

    def rollout_func(prompts, trainer):
        seen["text"] = generate_rollout_completions(trainer, ["hi"])[0]["prompt_ids"]
        seen["chat"] = generate_rollout_completions(trainer, ["hi"], as_chat=True)[0]["prompt_ids"]
        overrides = {"temperature": 0.5, "top_p": 0.9, "top_k": -1, "max_new_tokens": 3, "seed": 11}
        generate_rollout_completions(trainer, ["hi"], generation_overrides=overrides)
        for arguments in ({"generation_overrides": {"n": 2}}, {"as_chat": False}):
            with pytest.raises(RecipeError, match=r"unknown n; known: max_tokens|takes texts"):
                generate_rollout_completions(trainer, prompts, **arguments)
        return answering(prompts)

    engine = ScriptedEngine(lambda made: [END])
    play(rollout_func, engine=engine)
    assert seen == {"text": ids_of("hi"), "chat": renderer().prompt([Message.user("hi")]).ids}
    sampling = engine.calls[2].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 0)
    assert (sampling.max_tokens, sampling.seed) == (3, 11) and END in sampling.stop_ids


def test_it_works_from_other_threads_and_from_coroutines_only_beside_the_loop():
    async def rollout_func(prompts, trainer):
        with pytest.raises(PolicyError, match="wait for the event loop that it runs on"):
            generate_rollout_completions(trainer, prompts)
        made = await asyncio.to_thread(generate_rollout_completions, trainer, prompts)
        return {key: [one[key] for one in made] for key in ("prompt_ids", "completion_ids", "logprobs")}

    [[group, *_]], _ = play(rollout_func)
    assert group.trajectories[0].turns[0].ids == [9, 10, END]
    with pytest.raises(PolicyError, match="while the trainer runs it"):
        generate_rollout_completions(Trainer(), ["hi"])


def test_the_same_call_of_a_resumed_run_draws_the_same():
    def run() -> list[int | None]:
        def rollout_func(prompts, trainer):
            made = generate_rollout_completions(trainer, prompts)
            return {key: [one[key] for one in made] for key in ("prompt_ids", "completion_ids", "logprobs")}

        engine = ScriptedEngine(lambda made: [END])
        play(rollout_func, engine=engine, steps=2)
        return [made.sampling.seed for made in engine.calls]

    assert run() == run() and len(set(run())) == 12


# -- in a trainer --------------------------------------------------------------------------------------


def logged(trainer: Any, key: str) -> list[Any]:
    return [line[key] for line in trainer.state.log_history if key in line]


def test_a_trainer_learns_from_what_the_function_played(tmp_path):
    """On the embedded engine, with feedback between the turns, evaluated with the same function."""
    asked: list[tuple[int, str]] = []

    def rollout_func(prompts, trainer):
        asked.append((len(prompts), threading.current_thread().name))
        rows: dict[str, list[Any]] = {
            name: [] for name in ("prompt_ids", "completion_ids", "logprobs", "env_mask")
        }
        said = ids_of("<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n")
        first = generate_rollout_completions(trainer, prompts, generation_overrides={"max_tokens": 6})
        texts = [
            trainer.processing_class.decode([*one["prompt_ids"], *one["completion_ids"], *said])
            for one in first
        ]
        # Text may be read back as other tokens than were sampled, so what is learned from are the ids.
        second = generate_rollout_completions(trainer, texts, generation_overrides={"max_tokens": 4})
        for one, two in zip(first, second, strict=True):
            rows["prompt_ids"].append(one["prompt_ids"])
            rows["completion_ids"].append([*one["completion_ids"], *said, *two["completion_ids"]])
            rows["logprobs"].append([*one["logprobs"], *[0.0] * len(said), *two["logprobs"]])
            mask = [1] * len(one["completion_ids"]) + [0] * len(said) + [1] * len(two["completion_ids"])
            rows["env_mask"].append(mask)
        return {**rows, "turns": [2.0] * len(prompts)}

    def reward(completion_ids, turns, **_):
        return [len(set(ids)) + turn for ids, turn in zip(completion_ids, turns, strict=True)]

    given = trainers.model()
    before = trainers.weights(given)
    made = trainers.trainer(
        tmp_path, given=given, rollout_func=rollout_func, reward_funcs=reward, max_steps=2,
        eval_dataset=trainers.ROWS[:1],
    )  # fmt: skip
    made.train()
    made.evaluate()
    assert [count for count, _ in asked] == [8, 8, 4]
    assert {name for _, name in asked} == {threading.current_thread().name}, "where train() was called"
    now = trainers.weights(given)
    assert any(not torch.equal(before[name], now[name]) for name in now)
    assert len(logged(made, "reward")) == 2 and min(logged(made, "reward")) > 2.0
    assert logged(made, "eval_reward") and logged(made, "rewards/reward/mean")


def test_a_trainer_reads_plain_prompts_as_the_tokenizer_does(tmp_path):
    seen: dict[str, Any] = {}

    def reward(prompts, completions, completion_ids, **_):
        assert all(isinstance(one, str) for one in [*prompts, *completions])
        assert completions == [
            renderer().tokenizer.decode(ids, skip_special_tokens=True) for ids in completion_ids
        ]
        seen["prompts"] = prompts
        return [float(len(one)) for one in completions]

    rows = [{"prompt": f"Once upon {n}"} for n in range(4)]
    made = trainers.trainer(tmp_path, reward_funcs=reward, train_dataset=rows, max_steps=1)
    made.train()
    [[prompt]] = [set(seen["prompts"])]
    assert prompt.startswith("Once upon")
    trajectories = list(RunDir(tmp_path).read("rl"))
    assert len(trajectories) == 8
    for one in trajectories:
        assert one.turns[0].context_ids == ids_of(one.task["prompt"])
        assert one.stop_reason in (StopReason.ANSWERED, StopReason.CUT_REPLY, StopReason.MAX_TOKENS)


def test_a_trainer_gives_functions_the_environments_and_tools_their_turn(tmp_path):
    values: list[int] = []

    class Dice:
        def reset(self, **row: Any) -> str:
            self.row, self.rolled = row, 0
            return f" Row {row['n']}."

        def roll(self, sides: int) -> str:
            """Roll a die.

            Args:
                sides: How many.
            """
            self.rolled += 1
            return str(sides)

        def get_reward(self) -> float:
            return 0.25

    def reward(environments, n, trainer_state, log_extra, log_metric, **_):
        values.extend(one.row["n"] for one in environments)
        assert n == [one.row["n"] for one in environments]
        log_metric("step_seen", trainer_state.global_step)
        log_extra("rolled", [one.rolled for one in environments])
        return [float(one.rolled) + 0.1 * one.row["n"] for one in environments]

    made = trainers.trainer(tmp_path, reward_funcs=reward, environment_factory=Dice, max_steps=2)
    made.train()
    assert len(values) == 16
    assert logged(made, "rewards/Dice/mean") == [0.25, 0.25]
    assert logged(made, "step_seen") == [0.0, 1.0]
