"""Every dataset of the real reasoning-gym package resets, survives JSON, and pays its own answer in full."""

import asyncio
import json
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnwise.envs import Env
from turnwise.envs.baselines import baselines
from turnwise.envs.library import scorer
from turnwise.envs.library.entries import pack, unpack
from turnwise.envs.library.reasoning_gym import dataset_names, gold_answer, make_spec
from turnwise.envs.registry import make
from turnwise.errors import EnvError, EnvSpecError

SUM = {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}
NO_GOLD = {"boxnet", "rush_hour"}
"""Any plan that works is right; the package gives none."""
NEEDS_SETTINGS = {"composite"}


def instance(spec, task=None, seed=0):
    env = spec.env_class(**spec.args)
    env.rng = random.Random(seed)
    if task is not None:
        env.reset(json.loads(json.dumps(task)))
    return env


@pytest.mark.parametrize("name", sorted(set(dataset_names()) - NEEDS_SETTINGS))
def test_gold_answers_score_one_from_the_row_alone(name):
    spec = make_spec(name, None, {"size": 2})
    rows = [row for split in ("train", "test") for row in instance(spec).tasks(split)]
    assert 1 <= len(rows) <= 2
    for row in rows:
        env = instance(spec, row)
        assert env.reset(json.loads(json.dumps(row, allow_nan=False))) == row["question"]
        if name in NO_GOLD:
            assert gold_answer(env.entry) is None
            with pytest.raises(EnvError, match="gives no right answer"):
                env.teacher([])
        else:
            step = env.answer(**env.teacher([]).tool_calls[0].arguments)
            assert (step.reward, step.terminated) == (1.0, True)
        assert env.answer("").reward < 1.0


def test_composite_takes_its_parts_from_the_recipe():
    parts = [{"name": "chain_sum", "weight": 1, "config": SUM}, {"name": "gcd", "weight": 1}]
    spec = make_spec("composite", None, {"size": 20, "datasets": parts})
    rows = list(instance(spec).tasks("train"))
    assert {row["metadata"]["source_dataset"] for row in rows} == {"chain_sum", "gcd"}
    for row in rows:
        env = instance(spec, row)
        assert env.answer(**env.teacher([]).tool_calls[0].arguments).reward == 1.0


def test_the_split_is_by_question_and_hides_no_overlap():
    spec = make_spec("chain_sum", None, {**SUM, "size": 1000, "test_share": 0.25})
    questions = {split: [row["question"] for row in spec.tasks(split)] for split in ("train", "test")}
    assert not set(questions["train"]) & set(questions["test"])
    every = questions["train"] + questions["test"]
    assert len(every) == len(set(every)) == 1000
    assert abs(len(questions["test"]) / 1000 - 0.25) < 0.04
    # Another seed makes other rows, but no question changes its side.
    other = make_spec("chain_sum", None, {**SUM, "size": 1000, "test_share": 0.25, "seed": 77})
    assert not {row["question"] for row in other.tasks("test")} & set(questions["train"])
    assert [row["question"] for row in other.tasks("test")] != questions["test"]


def test_four_thousand_rows_take_about_a_second():
    spec = make_spec("chain_sum", None, {**SUM, "size": 4000})
    started = time.process_time()
    rows = list(instance(spec).tasks("train"))
    assert time.process_time() - started < 2.0
    assert len(rows) > 3000


def test_rows_are_the_same_each_time_also_where_the_package_uses_global_chance():
    spec = make_spec("list_functions", None, {"size": 200})
    random.seed(1)
    once = list(instance(spec).tasks("train"))
    random.seed(2)
    before = random.getstate()
    assert list(instance(spec).tasks("train")) == once
    assert random.getstate() == before


def test_a_small_space_ends():
    spec = make_spec("chain_sum", None, {**SUM, "min_terms": 1, "max_terms": 1, "size": 500})
    rows = [row for split in ("train", "test") for row in instance(spec).tasks(split)]
    assert len(rows) == 10


def sums(count=300, **args):
    spec = make_spec("chain_sum", None, {**SUM, "size": count, **args})
    return spec, list(instance(spec).tasks("train"))


def test_a_systematic_teacher_is_one_too_high():
    spec, rows = sums(error=0.5, error_kind="plus_one")
    off = []
    for seed, row in enumerate(rows):
        said = instance(spec, row, seed).teacher([]).tool_calls[0].arguments["answer"]
        off.append(int(said) - int(row["answer"]))
    assert set(off) == {0, 1}
    assert abs(sum(off) / len(off) - 0.5) < 0.1


def test_a_lazy_teacher_gives_up():
    spec, rows = sums(error=0.5, error_kind="zero")
    said = [
        instance(spec, row, seed).teacher([]).tool_calls[0].arguments["answer"]
        for seed, row in enumerate(rows)
    ]
    gave_up = [answer == "0" != row["answer"] for answer, row in zip(said, rows, strict=True)]
    assert all(answer in ("0", row["answer"]) for answer, row in zip(said, rows, strict=True))
    assert abs(sum(gave_up) / len(gave_up) - 0.5) < 0.1


def test_a_teacher_that_errs_at_random_says_another_training_answer():
    spec, rows = sums(error=1.0)
    answers = {row["answer"] for row in rows}
    for seed, row in enumerate(rows):
        said = instance(spec, row, seed).teacher([]).tool_calls[0].arguments["answer"]
        assert said in answers and said != row["answer"]


def test_plus_one_needs_whole_numbers():
    spec = make_spec("caesar_cipher", None, {"size": 5, "error": 1.0, "error_kind": "plus_one"})
    row = next(iter(instance(spec).tasks("train")))
    with pytest.raises(EnvError, match="needs whole-number answers"):
        instance(spec, row).teacher([])


def test_the_package_scores_and_partial_credit_can_be_refused():
    _, rows = sums()
    row = next(row for row in rows if row["answer"] == "5")
    env = instance(make_spec("chain_sum", None, SUM), row)
    assert env.answer("+5.0").reward == 1.0
    assert env.answer("-5").reward == 0.5  # the package's rule: "5" is half of "-5"
    assert env.answer("6").reward == 0.0
    strict = instance(make_spec("chain_sum", None, {**SUM, "partial_credit": False}), row)
    assert (strict.answer("5").reward, strict.answer("-5").reward) == (1.0, 0.0)


def test_the_prompt_may_show_fields_of_the_entry():
    spec, rows = sums(prompt="{expression} =")
    env = instance(spec)
    assert env.reset(rows[0]) == rows[0]["metadata"]["expression"] + " ="
    wrong = instance(make_spec("chain_sum", None, {**SUM, "prompt": "{sum}"}))
    with pytest.raises(EnvError, match=r"names the field 'sum'; there are .*expression"):
        wrong.reset(rows[0])


def test_numeric_answers_are_numbers_in_the_schema_and_in_the_call():
    spec = make_spec("chain_sum", "sums", {**SUM, "numeric": True})
    row = next(iter(instance(spec).tasks("train")))

    async def play():
        session = await spec.open(spec.limits)
        try:
            await session.reset(row, 0)
            said = await session.teacher([])
            return session.tools[0].parameters, said, await session.call(said.tool_calls[0])
        finally:
            await session.close()

    parameters, said, result = asyncio.run(play())
    assert parameters["properties"]["answer"] == {"type": "number"}
    assert said.tool_calls[0].arguments == {"answer": int(row["answer"])}
    assert result.step.reward == 1.0
    assert instance(spec, row).answer(float(row["answer"])).reward == 1.0


def test_only_scorers_that_compare_strings_run_on_the_event_loop():
    inline = {
        name: make_spec(name, None, {"size": 1}).env_class.inline
        for name in ("chain_sum", "countdown", "lcm")
    }
    assert inline == {"chain_sum": True, "countdown": False, "lcm": True}


def test_what_the_scorer_cannot_read_is_wrong_and_no_fault():
    spec = make_spec("rubiks_cube", None, {"size": 3})
    rows = [row for split in ("train", "test") for row in instance(spec).tasks(split)]
    for answer in ("x" * 10_000, "\x00", "{", "((((", "1/0", "None"):
        assert instance(spec, rows[0]).answer(answer).reward < 1.0


@pytest.mark.parametrize(
    ("name", "answer", "problem"),
    [
        ("countdown", "9**9**8", "scoring took more than 1 s"),
        ("n_queens", "().__class__.__base__.__subclasses__()", None),
        ("spiral_matrix", "[__import__('os')._exit(3)]", "scoring broke its process"),
    ],
)
def test_answers_that_a_scorer_runs_as_code_run_in_a_process_of_their_own(name, answer, problem, monkeypatch):
    """``9**9**8`` would hold this interpreter's lock for longer than any deadline."""
    monkeypatch.setattr(scorer, "SECONDS", 1)
    monkeypatch.setattr(scorer, "_child", scorer._Child())
    spec = make_spec(name, None, {"size": 2})
    row = next(row for split in ("train", "test") for row in instance(spec).tasks(split))
    step = instance(spec, row).answer(answer)
    assert step.reward < 1.0 and step.terminated
    assert step.info.get("scoring_error") == problem
    env = instance(spec, row)
    assert env.answer(**env.teacher([]).tool_calls[0].arguments).reward == 1.0


def test_baselines_come_from_the_training_answers_alone():
    spec = make("reasoning_gym:chain_sum", args={**SUM, "size": 1000})
    rows = list(spec.tasks("train"))
    counts = {}
    for row in rows:
        counts[row["answer"]] = counts.get(row["answer"], 0) + 1
    replies = baselines(instance(spec))
    constant = replies["constant"](random.Random(0)).tool_calls[0].arguments["answer"]
    at_random = [replies["random"](random.Random(seed)) for seed in range(400)]
    drawn = [reply.tool_calls[0].arguments["answer"] for reply in at_random]
    assert counts[constant] == max(counts.values())
    assert set(drawn) <= set(counts) and len(set(drawn)) > 10


def test_an_environment_without_baselines_has_none():
    class Plain(Env):
        def reset(self, task):
            return "?"

    assert baselines(Plain()) == {}
    assert sorted(baselines(instance(make("catch")))) == ["constant", "random"]


def test_names_and_settings_that_do_not_exist_are_named():
    with pytest.raises(EnvSpecError, match="no dataset 'chain_sun'; did you mean chain_sum"):
        make("reasoning_gym:chain_sun")
    with pytest.raises(
        EnvSpecError, match=r"no setting 'min_term'; did you mean 'min_terms'\? It has min_terms"
    ):
        make("reasoning_gym:chain_sum", args={"min_term": 2})
    with pytest.raises(EnvSpecError, match="max_terms must be >= min_terms"):
        make("reasoning_gym:chain_sum", args={"min_terms": 9})
    with pytest.raises(EnvSpecError, match="'random', 'plus_one' and 'zero'"):
        make("reasoning_gym:chain_sum", args={"error_kind": "minus_one"})


keys = st.text(max_size=3) | st.integers(0, 9) | st.tuples(st.integers(0, 3))
values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
        | st.sets(st.integers(0, 9) | st.tuples(st.integers(0, 3)), max_size=3)
    ),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(values)
def test_entries_survive_json(value):
    again = unpack(json.loads(json.dumps(pack(value))))
    assert again == value and type(again) is type(value)


def test_what_json_cannot_say_is_refused():
    with pytest.raises(TypeError, match="cannot write a Random as JSON"):
        pack({"rng": random.Random()})
