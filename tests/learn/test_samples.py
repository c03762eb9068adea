from dataclasses import replace

import pytest
from tests.support.tokenizers import tiny_tokenizer
from tests.support.trajectories import MOVE, trajectory

from turnwise.chat.renderer import TemplateRenderer, load_renderer
from turnwise.errors import LearnError
from turnwise.learn.samples import Demonstrations, rl_samples
from turnwise.types import Message, Sampling, Segment, ToolCall, Trajectory, Turn


def sampled(**changes: object) -> Trajectory:
    """Two turns of one segment and one of another."""

    def turn(context: list[int], ids: list[int], version: int) -> Turn:
        return Turn(
            message=Message.assistant("x"), context_ids=context, ids=ids,
            logprobs=[-0.5 - i for i in range(len(ids))], versions=[version] * len(ids),
        )  # fmt: skip

    first = Segment(prompt=(Message.user("q"),), turns=(turn([1, 2, 3], [7, 8], 4), turn([5], [9], 5)))
    second = Segment(prompt=(Message.user("q"),), turns=(turn([1, 6], [10, 11], 5),))
    return replace(trajectory(), segments=(first, second), sampling=Sampling(temperature=0.8), **changes)


def test_rl_samples_are_the_recorded_ids() -> None:
    one, two = rl_samples(sampled(), 1.5)
    assert one.token_ids_T.tolist() == [1, 2, 3, 7, 8, 5, 9]
    assert one.loss_mask_T.tolist() == [False, False, False, True, True, False, True]
    assert one.logprobs_T.tolist() == [0, 0, 0, -0.5, -1.5, 0, -0.5]
    assert one.advantages_T.tolist() == [0, 0, 0, 1.5, 1.5, 0, 1.5]
    assert one.versions_T.tolist() == [-1, -1, -1, 4, 4, -1, 5]
    assert one.temperature == 0.8
    assert two.token_ids_T.tolist() == [1, 6, 10, 11]
    assert (one.trajectory_id, one.group_id, one.env) == ("rl/0/catch/0/s0", "rl/0/catch/0", "catch")


def test_greedy_play_counts_as_untempered() -> None:
    greedy = replace(sampled(), sampling=Sampling(temperature=0.0))
    assert rl_samples(greedy, 1.0)[0].temperature == 1.0


@pytest.mark.parametrize("cut", [{"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_a_cut_distribution_is_refused(cut: dict[str, float]) -> None:
    with pytest.raises(LearnError, match="Set top_k to 0, top_p to 1 and min_p to 0"):
        rl_samples(replace(sampled(), sampling=Sampling(**cut)), 1.0)


def test_demonstrations_are_refused_by_rl() -> None:
    with pytest.raises(LearnError, match="was demonstrated by 'teacher'"):
        rl_samples(replace(sampled(), sampling=None, policy="teacher"), 1.0)


def test_missing_logprobs_and_contexts_are_refused() -> None:
    played = sampled()
    broken = replace(played.segments[0].turns[0], logprobs=[-0.5])
    with pytest.raises(LearnError, match="one of each for every sampled token"):
        rl_samples(replace(played, segments=(replace(played.segments[0], turns=(broken,)),)), 1.0)
    bare = replace(played.segments[0].turns[0], context_ids=[])
    with pytest.raises(LearnError, match="without a context before it"):
        rl_samples(replace(played, segments=(replace(played.segments[0], turns=(bare,)),)), 1.0)


@pytest.fixture(scope="module")
def renderer() -> TemplateRenderer:
    return load_renderer(tiny_tokenizer())


def test_a_demonstration_is_prompt_replies_and_bridges(renderer: TemplateRenderer) -> None:
    shown = trajectory(policy="teacher")
    (sample,) = Demonstrations(renderer).samples(shown)
    (segment,) = shown.segments
    wanted: list[int] = []
    mask: list[bool] = []

    def add(ids: list[int], own: bool) -> None:
        wanted.extend(ids)
        mask.extend([own] * len(ids))

    add(renderer.prompt(segment.prompt, [MOVE]).ids, False)
    add(renderer.reply(segment.turns[0].message), True)
    bridge = renderer.bridge(wanted, segment.turns[0].feedback, [MOVE])
    assert bridge is not None
    add(bridge.ids, False)
    add(renderer.reply(segment.turns[1].message), True)
    assert sample.token_ids_T.tolist() == wanted
    assert sample.loss_mask_T.tolist() == mask
    assert sample.logprobs_T.sum() == 0 and set(sample.versions_T.tolist()) == {-1}
    # What is learned is what would be sampled and parsed: the loss ends on the stop id.
    said = sample.token_ids_T[sample.loss_mask_T].tolist()
    assert said.count(renderer.stop_ids[0]) == 2 and said[-1] == renderer.stop_ids[0]


def test_equal_replies_are_rendered_once(renderer: TemplateRenderer, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Message] = []
    original = renderer.reply
    monkeypatch.setattr(renderer, "reply", lambda *said: calls.append(said[0]) or original(*said))
    demonstrations = Demonstrations(renderer, cached_replies=2)
    shown = trajectory(policy="teacher", moves=("left", "left", "left"))
    same = demonstrations.samples(shown)
    # Call ids differ (c0, c1, c2), and a template may write them; each is rendered, but only once for all
    # trajectories, until more than `cached_replies` others have come.
    assert len(calls) == 3
    again = demonstrations.samples(trajectory(policy="teacher", moves=("left",)))
    assert len(calls) == 4
    assert (
        same[0].token_ids_T[same[0].loss_mask_T][: len(again)].tolist()[0]
        == again[0].token_ids_T[again[0].loss_mask_T].tolist()[0]
    )
    demonstrations.samples(trajectory(policy="teacher", moves=("left",)))
    assert len(calls) == 4


def test_recorded_ids_are_kept_in_sft(renderer: TemplateRenderer) -> None:
    (one, two) = Demonstrations(renderer).samples(sampled())
    assert one.token_ids_T.tolist() == [1, 2, 3, 7, 8, 5, 9]
    assert two.token_ids_T.tolist() == [1, 6, 10, 11]
    assert one.temperature == 1.0


def test_a_template_without_bridge_makes_a_row_for_each_turn() -> None:
    # It writes how many questions there are into the beginning, so nothing can be appended.
    counting = tiny_tokenizer(
        "<|im_start|>system\n"
        '{{ messages | selectattr("role", "equalto", "user") | list | length }}<|im_end|>\n'
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    renderer = load_renderer(counting)
    turns = (
        Turn(message=Message.assistant("yes"), feedback=(Message.user("and?"),)),
        Turn(message=Message.assistant("no")),
    )
    shown = replace(
        trajectory(policy="teacher"), tools=(), segments=(Segment(prompt=(Message.user("q"),), turns=turns),)
    )
    assert renderer.bridge([1], [Message.user("and?")]) is None
    one, two = Demonstrations(renderer).samples(shown)
    whole = [Message.user("q"), Message.assistant("yes"), Message.user("and?")]
    assert two.token_ids_T[~two.loss_mask_T].tolist() == renderer.prompt(whole).ids
    assert renderer.decode(two.token_ids_T[two.loss_mask_T].tolist()) == "no<|im_end|>"
    assert renderer.decode(one.token_ids_T[one.loss_mask_T].tolist()) == "yes<|im_end|>"


def test_call_ids_do_not_confuse_equal_messages(renderer: TemplateRenderer) -> None:
    call = ToolCall(name="move", arguments={"direction": "left"}, id="c7")
    shown = replace(
        trajectory(policy="teacher"),
        segments=(Segment(prompt=(Message.user("q"),), turns=(Turn(message=Message.assistant("", call)),)),),
    )
    (sample,) = Demonstrations(renderer).samples(shown)
    assert sample.token_ids_T[sample.loss_mask_T].tolist() == renderer.reply(Message.assistant("", call))
