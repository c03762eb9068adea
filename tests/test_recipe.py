"""Recipes: what is wrong with one is said at once, with the line, the nearest key and what is allowed."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from turnwise.errors import RecipeError
from turnwise.recipe import changed_keys, lines, load_recipe, resolved, show
from turnwise.recipe_docs import recipe_docs
from turnwise.recipe_yaml import inline, parse_mapping, parse_value

RECIPE = """\
name: small
model: {scratch: {}}
environments:
  catch: {args: {rows: 6}}
  sum: {env: "reasoning_gym:chain_sum"}
collect:
  episodes: {catch: 10, sum: 20}
sft:
  steps: 30
  batch: {catch: 2, sum: 4}
rl:
  steps: 5
  groups: {catch: 2, sum: 4}
  optimizer: {lr: 6e-4}
evaluate:
  tasks: {catch: 8, sum: 8}
"""


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str = RECIPE) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as found:
        load_recipe(path, overrides)
    assert str(path) in str(found.value)
    return str(found.value)


def test_load(write) -> None:
    recipe = load_recipe(write())
    assert recipe.rl is not None and recipe.rl.optimizer.lr == 6e-4  # YAML 1.1 would have read text
    assert recipe.environments["catch"].args == {"rows": 6}
    assert recipe.evaluate is not None and recipe.evaluate.seeds == 1


def test_overrides(write) -> None:
    recipe = load_recipe(
        write(), ["rl.steps=7", "rl.optimizer.betas=[0.9, 0.95]", "engine.kv_tokens=64", "sft.weighting=env"]
    )
    assert recipe.rl is not None and recipe.rl.steps == 7 and recipe.rl.optimizer.betas == (0.9, 0.95)
    assert recipe.rl.optimizer.lr == 6e-4
    assert recipe.engine.kv_tokens == 64
    assert load_recipe(write(), ["rl=null"]).rl is None
    assert (
        load_recipe(write(), ["environments.catch.args.level=a=b"]).environments["catch"].args["level"]
        == "a=b"
    )


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("rl.steps", "an override is key=value, such as rl.steps=10; found 'rl.steps'"),
        ("rl..steps=1", "an override is key=value"),
        ("name.x=1", "override 'name.x=1': name is small, which has no keys"),
        ("rl.steps=[1", r"'\[1' is not YAML: line 1"),
        (
            "rl.stepz=1",
            r"recipe.yaml: rl.stepz: unknown key; did you mean 'steps'\? allowed here are steps, groups,",
        ),
    ],
)
def test_bad_overrides(write, override: str, problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        load_recipe(write(), [override])


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (
            "  steps: 5",
            "  stepz: 5",
            "line 12: rl.stepz: unknown key; did you mean 'steps'? allowed here are steps,",
        ),
        ("  steps: 5", "  steps: five", "recipe.yaml: line 12: rl.steps: must be an integer; found five"),
        ("  steps: 5", '  steps: "5"', 'line 12: rl.steps: must be an integer; found "5"'),
        ("  steps: 5", "  steps: true", "line 12: rl.steps: must be an integer; found true"),
        ("  steps: 5", "  steps: 0", "line 12: rl.steps: must be greater than or equal to 1; found 0"),
        ("  steps: 5\n", "", "rl.steps: is required"),
        ("  steps: 5", "  steps: 5\n  loss: pop", "rl.loss: must be 'ppo', 'dapo', 'dr_grpo', "),
        (
            "  steps: 5",
            "  steps: 5\n  lr: 1.0",
            "unknown key; did you mean sft.optimizer.lr or rl.optimizer.lr?",
        ),
        ("  steps: 5", "  steps: 5\n  steps: 6", "line 13: the key 'steps' stands on line 12 already"),
        (
            "  episodes: {catch: 10, sum: 20}",
            "  episodes: {1: 2}",
            "line 7: a key must be text, found 1; quote it",
        ),
        (
            "  episodes: {catch: 10, sum: 20}",
            "  episodes: [1]",
            "collect.episodes: must be a mapping; found [1]",
        ),
        (
            "  tasks: {catch: 8, sum: 8}",
            "  tasks: {catch: x, sum: 8}",
            "evaluate.tasks.catch: must be an integer",
        ),
        ("{scratch: {}}", "{}", "line 2: model: set exactly one of model.name and model.scratch"),
        ("{scratch: {}}", "{scratch: {}, name: x}", "set exactly one of model.name and model.scratch"),
        ("name: small", "name: a/b", "line 1: name: String should match pattern"),
        (
            "  catch: {args: {rows: 6}}",
            "  catch: {arg: {}}",
            "environments.catch.arg: unknown key; did you mean 'args'",
        ),
        ("  steps: 30\n", "  steps: 30\n bad: [", "is not YAML: line 10, column "),
    ],
)
def test_bad_files(write, old: str, new: str, problem: str) -> None:
    assert old in RECIPE
    assert problem in refused(write(RECIPE.replace(old, new)))


def test_all_problems_are_told_at_once(write) -> None:
    text = refused(write(RECIPE.replace("  steps: 5", "  steps: x\n  stepz: 5")))
    assert "2 problems\n  line 12: rl.steps" in text and "\n  line 13: rl.stepz" in text


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is empty; a recipe is a mapping that begins with 'name: …'"),
        ("# nothing\n", "is empty"),
        ("- a\n- b\n", "must be a mapping of keys to values, found a list"),
        ("hello", "must be a mapping of keys to values, found a str"),
        ("a: !!python/object:os.system {}", "is not YAML: line 1"),
    ],
)
def test_files_that_are_no_recipe(write, text: str, problem: str) -> None:
    assert problem in refused(write(text))


def test_no_file(tmp_path: Path) -> None:
    assert "cannot read the recipe" in refused(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot read the recipe" in refused(tmp_path / "bytes.yaml")


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            ["rl.loss=reinforce", "rl.clip_low=0.2"],
            "rl.clip_low: does nothing with rl.loss=reinforce; remove it",
        ),
        (["rl.optimizer.muon_lr=0.02"], "rl.optimizer.muon_lr: does nothing with rl.optimizer.kind=adamw"),
        (["sft.optimizer.muon_lr=0.02"], "sft.optimizer.muon_lr: does nothing with sft.optimizer.kind=adamw"),
        (["model.revision=main"], "model.revision: does nothing with model.scratch"),
        (["model.quantization=nf4"], "model.quantization: weights in 4 bits are not trained themselves; add"),
        (
            ["model.quantization=fp4", "model.lora={}", "parallel.kind=fsdp"],
            "model.quantization: fsdp cannot spread weights in 4 bits; use parallel.kind=ddp",
        ),
        (
            ["model.quantization=nf4", "model.lora={}", "sft=null", "rl=null"],
            "model.quantization: does nothing without sft or rl",
        ),
        (["model.thinking=template"], "model.thinking: does nothing with model.scratch, whose own template"),
        (
            ["evaluate.sampling={temperature: 0.0, top_p: 0.9}"],
            "evaluate.sampling.top_p: does nothing at temperature 0",
        ),
        (["collect.sampling={top_k: 3}"], "collect.sampling.top_k: does nothing with collect.policy=teacher"),
        (
            ["rl.groups={cathc: 2, sum: 1}"],
            "rl.groups.cathc: no such environment; there are catch, sum; did you mean 'catch'?",
        ),
        (
            ["collect.episodes={zzz: 1, catch: 1, sum: 1}"],
            "collect.episodes.zzz: no such environment; there are catch",
        ),
        (["collect.keep={catch: 1.0, other: 1.0}"], "collect.keep.other: no such environment"),
        (["evaluate.tasks={cat: 3}"], "evaluate.tasks.cat: no such environment"),
        (["environments.echo={}"], "environments.echo: no stage plays it; name it in collect.episodes or"),
        (["rl.groups={catch: 0}"], "rl.groups.catch: must be at least 1, found 0"),
        (["sft.batch={}"], "sft.batch: names no environment"),
        (["rl.sampling.top_p=0.9"], "rl.sampling.top_p: a cut distribution is not the one that is trained"),
        (["rl.sampling.top_k=50"], "rl.sampling.top_k: a cut"),
        (["rl.sampling.min_p=0.1"], "rl.sampling.min_p: a cut"),
        (["rl.sampling.temperature=0.0"], "rl.sampling.temperature: siblings must differ"),
        (
            ["evaluate.sampling.temperature=0.0"],
            "evaluate.greedy: at evaluate.sampling.temperature=0 it would",
        ),
        (
            ["evaluate.sampling.temperature=0.0", "evaluate.greedy=false", "evaluate.seeds=3"],
            "evaluate.seeds: 3 episodes of a task are alike at temperature 0; use 1",
        ),
        (["model.dtype=float16"], "model.dtype: float16 overflows in training"),
        (
            ["tasks={trian: rows.jsonl}"],
            "tasks.trian: no stage plays this split; played are: test, train; did you mean 'train'?",
        ),
        (["rl.minibatches=7"], "rl.minibatches: 7 need as many groups a step, and rl.groups makes 6"),
        (
            ["rl.loss=dapo", "rl.clip_high=0.28", "rl.normalise=constant"],
            "rl.normalise: rl.loss=dapo is ppo normalised by token, found constant",
        ),
        (
            ["rl.loss=dapo", "rl.clip_high=0.2"],
            "rl.clip_high: rl.loss=dapo clips higher above than below, found 0.2 with rl.clip_low=0.2",
        ),
        (["rl.loss=luspo"], "rl.normalise: rl.loss=luspo is gspo normalised by sum, found token; set it"),
        (["rl.loss=dr_grpo"], "rl.normalise: rl.loss=dr_grpo is ppo normalised by constant, found token"),
        (["rl.loss=cispo", "rl.clip_low=0.1"], "rl.clip_low: does nothing with rl.loss=cispo; remove it"),
        (["rl.sapo={tau_positive: 2.0}"], "rl.sapo.tau_positive: does nothing with rl.loss=ppo; remove it"),
        (["rl.loss=sapo", "rl.clip_high=0.3"], "rl.clip_high: does nothing with rl.loss=sapo"),
        (["rl.kl_estimator=k2"], "rl.kl_estimator: does nothing with rl.kl=0; remove it"),
        (["rl.kl_in=reward"], "rl.kl_in: does nothing with rl.kl=0; remove it"),
        (
            ["rl.kl=0.1", "rl.kl_in=reward", "rl.kl_estimator=k2"],
            "rl.kl_estimator: does nothing with rl.kl_in=reward, which sums the log-ratio itself; remove it",
        ),
        (["rl.loss=rloo"], "rl.normalise: rl.loss=rloo is a mean of sequences' sums, found token; set it to"),
        (["rl.loss=cispo", "rl.ratio_cap=4.0"], "rl.ratio_cap: does nothing with rl.loss=cispo; remove it"),
        (["rl.ratio_cap=1.1"], "rl.ratio_cap: must be above the clip, 1 + rl.clip_high = 1.2, found 1.1"),
        (["rl.minibatch_of=episodes"], "rl.minibatch_of: does nothing with rl.minibatches=1; remove it"),
        (["rl.normalise_over=step"], "rl.normalise_over: does nothing with rl.minibatches=1; remove it"),
        (["rl.optimizer.floor=0.1"], "rl.optimizer.floor: does nothing with rl.optimizer.schedule=constant"),
        (
            ["rl.minibatches=49", "rl.minibatch_of=episodes"],
            "rl.minibatches: 49 need as many episodes a step, and rl.groups makes 48",
        ),
        (
            ["rl.advantage=maxrl", "rl.scale=batch"],
            "rl.scale: does nothing with rl.advantage=maxrl, which says itself what it divides by; remove it",
        ),
        (
            ["rl.rewards=separately", "rl.scale=none"],
            "rl.scale: does nothing with rl.rewards=separately, which divides by the group's deviation",
        ),
        (
            ["rl.advantage=rloo", "rl.scale=group"],
            "rl.scale: rl.advantage=rloo divides by none or batch, found group; choose one of them",
        ),
        (["rl.credit.gamma=0.9"], "rl.credit.gamma: does nothing with rl.credit.kind=trajectory; remove it"),
        (
            ["rl.credit={kind: mt_grpo, gamma: 0.9}"],
            "rl.credit.gamma: does nothing with rl.credit.kind=mt_grpo",
        ),
        (
            ["rl.credit={kind: returns, weight: 2.0}"],
            "rl.credit.weight: does nothing with rl.credit.kind=returns",
        ),
        (
            ["rl.credit={kind: gigpo}", "rl.advantage=reinforce_pp"],
            "rl.advantage: rl.credit.kind=gigpo compares turns by grpo, dr_grpo, rloo, "
            "reinforce_pp_baseline, found reinforce_pp; choose one of them, or rl.credit.kind=trajectory",
        ),
        (
            ["rl.credit={kind: returns}", "rl.advantage=maxrl"],
            "rl.advantage: rl.credit.kind=returns compares turns by grpo,",
        ),
        (
            ["rl.rewards=separately", "rl.advantage=rloo"],
            "rl.advantage: rl.rewards=separately compares each reward by grpo, found rloo",
        ),
        (
            ["rl.rewards=separately", "rl.credit={kind: gigpo}"],
            "rl.credit.kind: rl.rewards=separately compares whole episodes, found gigpo",
        ),
        (["rl.correction={high: 4.0}"], "rl.correction.high: does nothing with rl.correction.kind=none"),
        (
            ["rl.loss=dppo", "rl.correction.kind=tis"],
            "rl.correction.kind: rl.loss=dppo weighs tokens by their whole ratio to the sampler, found tis",
        ),
        (
            ["rl.loss=vespo", "rl.correction.kind=sequence_mask"],
            "rl.correction.kind: rl.loss=vespo makes its sequence's ratio of tokens', found sequence_mask",
        ),
        (
            ["rl.correction={kind: ignore, high: 4.0}"],
            "rl.correction.high: does nothing with rl.correction.kind=ignore",
        ),
        (
            ["rl.correction.kind=geometric_mask", "rl.sampling.top_p=0.9"],
            "rl.sampling.top_p: a cut distribution is not the one that is trained, found 0.9 with "
            "rl.correction.kind=geometric_mask; remove it, or set rl.correction.kind to tis",
        ),
        (
            ["rl.groups={catch: 2}", "rl.normalise_by_env=true"],
            "rl.normalise_by_env: does nothing with a single",
        ),
        (["rl.optimizer.warmup_steps=5"], "rl.optimizer.warmup_steps: 5 leave none of the stage's 5 updates"),
        (
            ["rl=null", "evaluate.stages=[sft, rl]"],
            "evaluate.stages: this run makes no 'rl', only untrained, sft",
        ),
        (["evaluate.stages=[]"], "evaluate.stages: names none; this run makes untrained, sft, rl"),
        (["collect=null"], "sft: there is nothing to learn from"),
        (["collect.episodes={catch: 3}"], "sft.batch.sum: collect.episodes plays no sum"),
        (
            ["collect.policy=techer"],
            "collect.policy: must be teacher, engine or endpoint:URL#model, found 'techer'",
        ),
        (["collect.policy=endpoint:http://x"], "collect.policy: must be teacher"),
        (["collect=null", "sft=null", "rl=null", "evaluate=null"], "there is nothing to do"),
        (["sft=null", "rl=null", "push_to_hub={repo: a/b}"], "push_to_hub: nothing is trained"),
        (
            ["engine.max_context=512", "environments.catch.limits.max_context=600"],
            "environments.catch.limits.max_context: 600 is more than engine.max_context, 512",
        ),
        (["engine.max_context=512"], "rl.sampling.max_tokens: 512 leave no room for a prompt"),
        (["environments.catch.env=[]"], "environments.catch.env: names no server; write http://host:port"),
        (["environments.catch.env=[http://a:1, catch]"], "is of servers, http://host:port; found 'catch'"),
    ],
)
def test_what_may_not_stand_together(write, overrides: list[str], problem: str) -> None:
    assert problem in refused(write(), *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["rl.loss=reinforce"],
        ["rl.optimizer.kind=muon", "rl.optimizer.muon_lr=0.03"],
        ["rl=null"],
        ["collect=null", "sft.sources=[a.jsonl]"],
        ["collect.policy='endpoint:http://localhost:8000/v1#qwen'"],
        ["rl.minibatches=6", "rl.epochs=2", "rl.optimizer.warmup_steps=59"],
        ["evaluate.sampling.top_p=0.9"],
        ["rl.loss=dapo", "rl.clip_high=0.28"],
        ["rl.advantage=rloo", "rl.scale=batch"],
        ["rl.advantage=reinforce_pp_baseline", "rl.credit={kind: gigpo, gamma: 1.0, weight: 0.5}"],
        ["rl.rewards=separately"],
    ],
)
def test_resolved_loads_as_the_same_recipe(write, overrides: list[str]) -> None:
    recipe = load_recipe(write(), overrides)
    text = resolved(recipe)
    again = load_recipe(write(text))
    assert resolved(again) == text
    assert again.rl == recipe.rl and again.sft == recipe.sft and again.environments == recipe.environments
    shown, whole = yaml.safe_load(text)["engine"], recipe.model_dump(mode="json")["engine"]
    assert shown == {key: value for key, value in whole.items() if key in shown} and "max_sequences" in shown


def test_resolved_names_what_runs_and_marks_what_changed(write) -> None:
    recipe = load_recipe(write(), ["rl=null"])
    text = resolved(recipe)
    assert "  stages: [untrained, sft]\n" in text
    assert "muon_lr" not in text
    changed = {line.key for line in lines(recipe) if line.changed and line.value}
    assert changed == {"name", "args", "env", "episodes", "steps", "batch", "tasks"}


def test_changed_keys(write) -> None:
    old = resolved(load_recipe(write()))
    new = resolved(
        load_recipe(write(), ["rl.steps=9", "environments.catch.args={rows: 4}", "rl.optimizer.kind=muon"])
    )
    before, now = yaml.safe_load(old), yaml.safe_load(new)
    assert changed_keys(before, before) == []
    assert changed_keys(before, now) == [
        "environments.catch.args.rows: 6 before, 4 now",
        "rl.steps: 5 before, 9 now",
        "rl.optimizer.kind: adamw before, muon now",
        "rl.optimizer.muon_lr: not there before, 0.02 now",
    ]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6), ("2E5", 2e5), ("-.inf", float("-inf")), ("10", 10), ("010", 10), ("0x1f", 31),
        ("0o17", 15), ("1:30", "1:30"), ("no", "no"), ("on", "on"), ("true", True), ("~", None), ("", None),
        ("2024-01-01", "2024-01-01"), ("1_000", "1_000"), ("1.2.3", "1.2.3"), ("e5", "e5"), ("'1'", "1"),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    found = parse_value(text)
    assert found == value and type(found) is type(value)


def test_anchors_may_be_merged() -> None:
    text = "a: &base {x: 1, y: 2}\nb: {<<: *base, y: 3}\n"
    assert parse_mapping(text, "here")["b"] == {"x": 1, "y": 3}


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"))
)


@given(
    st.recursive(
        scalars, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text("ab: -#'\"é", max_size=3), x)
    )
)
def test_inline_is_read_back(value: object) -> None:
    assert parse_value(inline(value)) == value == yaml.safe_load(inline(value))


def test_show_marks_what_changed(write) -> None:
    recipe = load_recipe(write())
    plain, terminal = io.StringIO(), io.StringIO()
    show(recipe, Console(file=plain))
    show(recipe, Console(file=terminal, force_terminal=True, color_system="standard", _environ={}))
    assert plain.getvalue() == resolved(recipe)
    assert "  steps:\x1b[1;32m 5\x1b[0m" in terminal.getvalue()
    assert "  group_size:\x1b[2m 8\x1b[0m" in terminal.getvalue()


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parents[1].glob("recipes/*.yaml")), ids=lambda path: path.stem
)
def test_published_recipes_load(path: Path) -> None:
    recipe = load_recipe(path)
    assert resolved(recipe).startswith(f"name: {path.stem}\n")


def test_the_documentation_is_up_to_date() -> None:
    page = Path(__file__).parents[1] / "docs/recipes.md"
    assert page.read_text(encoding="utf-8") == recipe_docs(), (
        "python -m turnwise.recipe_docs > docs/recipes.md"
    )


def test_the_documentation_names_every_key() -> None:
    text = recipe_docs()
    assert "| `steps` | integer ≥ 1 | **required** |" in text
    assert "| `optimizer` | section | `{lr: 1.0e-05, schedule: linear}` |" in text
    assert "| `dropout` | number ≥ 0, < 1 | `0.0` |" in text
    assert text.count("## `sft.optimizer`") == 1 and "## `rl.optimizer`" not in text
    assert "## `environments.<name>.limits`" in text
