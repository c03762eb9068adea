"""TRL's arguments, field by field: the same names and defaults, and each honoured, told or refused."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from transformers import HfArgumentParser

import turnwise
from turnwise import GRPOConfig, RLOOConfig, SFTConfig
from turnwise.compat.fields import (
    BEGIN,
    END,
    Field,
    Honoured,
    Refused,
    Told,
    check,
    defaults,
    fields_of,
    is_set,
    tables,
    told,
    with_tables,
)
from turnwise.compat.fields_rl import OWN
from turnwise.errors import RecipeError

ROOT = Path(__file__).parents[2]
PAIRS = [(trl.GRPOConfig, GRPOConfig), (trl.RLOOConfig, RLOOConfig), (trl.SFTConfig, SFTConfig)]
OURS = [ours for _, ours in PAIRS]


def named(field: Any) -> str:
    return getattr(field, "__name__", str(field))


def ours_alone(config: type) -> set[str]:
    """The fields that TRL's config does not have."""
    return set() if config is SFTConfig else set(OWN)


def of_kind(kind: type[Field], *, everywhere: bool = False) -> list[Any]:
    """Fields of a category; what configs share is taken of the first alone, unless asked for."""
    seen: set[tuple[str, int]] = set()
    found = []
    for config in OURS:
        for name, field in fields_of(config).items():
            if isinstance(field, kind) and (everywhere or (name, id(field)) not in seen):
                seen.add((name, id(field)))
                found.append(pytest.param(config, name, id=f"{config.__name__}-{name}"))
    return found


@pytest.mark.parametrize(("theirs", "ours"), PAIRS, ids=named)
def test_every_field_of_trl_is_there_with_its_default(theirs: type, ours: type) -> None:
    """There is no deliberate difference, but for fields that are ours."""
    own = ours_alone(ours)
    assert {name: one for name, one in defaults(ours).items() if name not in own} == dict(defaults(theirs))
    order = [field.name for field in dataclasses.fields(ours) if field.init]
    assert set(order) - own == {field.name for field in dataclasses.fields(theirs) if field.init}


@pytest.mark.parametrize(("theirs", "ours"), PAIRS, ids=named)
def test_every_field_is_in_a_category(theirs: type, ours: type) -> None:
    names = {field.name for field in dataclasses.fields(theirs)}
    assert fields_of(ours).keys() == names | ours_alone(ours) == fields_of(theirs).keys()


def test_a_class_made_from_one_has_its_categories() -> None:
    @dataclasses.dataclass
    class Mine(GRPOConfig):
        rounds: int = 3

    assert fields_of(Mine) == fields_of(GRPOConfig)
    with pytest.raises(TypeError, match="int is none of GRPOConfig"):
        fields_of(int)


# -- refused ------------------------------------------------------------------------------------------

UNUSUAL: dict[str, Any] = {
    "optim": "adafactor", "train_sampling_strategy": "group_by_length", "hub_strategy": "checkpoint",
    "activation_checkpointing_kwargs": {"use_reentrant": True}, "use_cache": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": True}, "debug": "underflow_overflow",
    "include_for_metrics": ["inputs"], "loss_type": "dft", "pad_to_multiple_of": 64,
    "remove_unused_columns": False,
}  # fmt: skip
"""Values to refuse where another one than the default would not do."""


def unusual(config: type, name: str) -> Any:
    """A value that is neither the default nor like it."""
    default = defaults(config)[name]
    if name in UNUSUAL:
        return UNUSUAL[name]
    if isinstance(default, bool):
        return not default
    if isinstance(default, int | float):
        return default + 1
    return f"{default or 'some'}-thing"


REFUSABLE = [
    one
    for one in of_kind(Refused)
    if unusual(one.values[0], one.values[1]) not in fields_of(one.values[0])[one.values[1]].also
]


@pytest.mark.parametrize(("config", "name"), REFUSABLE)
def test_what_is_refused_says_why(config: Any, name: str) -> None:
    field = fields_of(config)[name]
    assert isinstance(field, Refused) and len(field.why) > 20
    with pytest.raises(RecipeError) as caught:
        config(output_dir="x", **{name: unusual(config, name)})
    assert f"{name}=" in str(caught.value) and field.why in str(caught.value)


def test_all_refusals_are_tried_but_those_with_no_value_left() -> None:
    left = {tuple(one.values) for one in of_kind(Refused)} - {tuple(one.values) for one in REFUSABLE}
    assert {name for _, name in left} == {
        "use_cache", "log_on_each_node", "dataloader_drop_last", "remove_unused_columns", "disable_dropout",
        "use_transformers_continuous_batching", "use_transformers_paged",
    }  # fmt: skip


@pytest.mark.parametrize(("config", "name"), of_kind(Refused))
def test_what_asks_for_what_is_done_anyway_is_taken(config: Any, name: str) -> None:
    field = fields_of(config)[name]
    assert isinstance(field, Refused)
    for value in field.also:
        config(output_dir="x", **{name: value})


def test_everything_that_is_wrong_is_in_one_message() -> None:
    with pytest.raises(RecipeError, match=r"(?s)2 arguments are not taken:.*fp16=True.*deepspeed="):
        GRPOConfig(output_dir="x", deepspeed="ds.json", fp16=True)


def test_a_config_of_trl_is_checked_when_it_is_used(tmp_path: Path) -> None:
    theirs = trl.GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    check(theirs)
    assert told(theirs) == []
    theirs.sync_ref_model = True
    with pytest.raises(RecipeError, match="sync_ref_model=True: the reference is the model that training"):
        check(theirs)


# -- told ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "name"), of_kind(Told))
def test_what_does_nothing_is_told(config: Any, name: str) -> None:
    value = {"liger_kernel_config": {"rope": True}, "dataset_num_proc": 2}.get(name)
    beside = {"dataloader_num_workers": 1} if name == "dataloader_prefetch_factor" else {}
    if value is None:
        value = 2 if defaults(config)[name] is None else unusual(config, name)
    args = config(output_dir="x", **{name: value}, **beside)
    field = fields_of(config)[name]
    assert isinstance(field, Told)
    if value not in field.also:
        assert f"{name} does nothing: {field.why}" in told(args)
    assert told(config(output_dir="x")) == []


# -- honoured -----------------------------------------------------------------------------------------

READ: dict[str, set[str]] = {}


def read_by(module: Path) -> set[str]:
    """Attributes that a module reads."""
    return {
        node.attr
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }


def readers(config: type) -> Iterator[Path]:
    """The modules of a config's trainer."""
    foreign = ("sft.py", "lessons.py") if config is not SFTConfig else ("trainer.py", "grpo.py", "rloo.py")
    for module in (ROOT / "src/turnwise/compat").glob("*.py"):
        if not module.name.startswith(("arguments", "fields", "translate")) and module.name not in foreign:
            yield module


@pytest.mark.parametrize(
    ("config", "name"),
    [
        one
        for one in of_kind(Honoured, everywhere=True)
        if fields_of(one.values[0])[one.values[1]].at != "plan"
    ],
)
def test_what_is_honoured_elsewhere_is_read_there(config: Any, name: str) -> None:
    field = fields_of(config)[name]
    assert isinstance(field, Honoured)
    if field.at == "compat":
        if config not in READ:
            READ[config] = set().union(*(read_by(module) for module in readers(config)))
        assert name in READ[config]
    elif field.at.startswith("transformers."):
        source = inspect.getsource(importlib.import_module(field.at))
        kind, _, steps = name.rpartition("_")
        assert f"args.{name}" in source or (steps == "steps" and f'"{kind}"' in source)
    else:
        assert (field.at, name) in [
            ("config", "tf32"), ("script", "do_train"), ("script", "do_eval"), ("script", "do_predict"),
            ("script", "resume_from_checkpoint"), ("script", "push_to_hub"),
        ]  # fmt: skip


def test_tf32_is_torchs_switch() -> None:
    """Which there is none of on a CPU, as transformers says."""
    if torch.cuda.is_available():
        GRPOConfig(output_dir="x", tf32=True)
        assert torch.backends.cuda.matmul.allow_tf32
    else:
        with pytest.raises(ValueError, match="tf32 requires Ampere"):
            GRPOConfig(output_dir="x", tf32=True)


# -- making one ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", OURS, ids=named)
def test_defaults_work_where_they_are_made(config: Any) -> None:
    """TRL's own raise on a machine without a GPU."""
    args = config(output_dir="x")
    gpu = torch.cuda.is_available()
    assert args.use_cpu is (not gpu) and args.bf16 is gpu and args.fp16 is False
    assert args.activation_checkpointing is True and args.gradient_checkpointing is True
    assert args.logging_steps == 10 and args.report_to == []


@pytest.mark.filterwarnings("error")
def test_making_one_warns_of_nothing() -> None:
    GRPOConfig(output_dir="x")
    assert GRPOConfig(output_dir="x", gradient_checkpointing=False).activation_checkpointing is False


def test_bfloat16_may_be_asked_for_on_a_cpu() -> None:
    assert GRPOConfig(output_dir="x", use_cpu=True, bf16=True).bf16 is True
    assert GRPOConfig(output_dir="x", use_cpu=True).bf16 is False


def test_batches_are_sized_as_in_trl() -> None:
    for settings in (
        {},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 6},
        {"per_device_train_batch_size": 4, "steps_per_generation": 6},
        {"per_device_train_batch_size": 4, "generation_batch_size": 16},
    ):
        ours = GRPOConfig(output_dir="x", **settings)
        theirs = trl.GRPOConfig(output_dir="x", use_cpu=True, bf16=False, **settings)
        sizes = [(one.generation_batch_size, one.steps_per_generation) for one in (ours, theirs)]
        assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"generation_batch_size": 12}, "generation_batch_size is 12 and must be a multiple of"),
        ({"num_generations": 3}, "8 episodes are played at once .* multiple of num_generations, 3"),
        ({"num_generations": 1}, "num_generations is 1; .* takes at least 2"),
        (
            {"generation_batch_size": 16, "steps_per_generation": 3},
            "generation_batch_size is 16 and steps_per_generation=3 makes 24: set one of them",
        ),
    ],
)
def test_batches_that_do_not_fit_are_refused_as_in_trl(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        GRPOConfig(output_dir="x", **settings)
    with pytest.raises(ValueError):
        trl.GRPOConfig(output_dir="x", use_cpu=True, bf16=False, **settings)


def test_a_config_can_be_changed_into_another() -> None:
    """TRL's own are refused then, as what is derived counts as given."""
    args = GRPOConfig(output_dir="x", num_generations=4)
    assert dataclasses.replace(args, learning_rate=1e-4).generation_batch_size == 8
    assert is_set(args, "num_generations") and not is_set(args, "temperature")


def test_old_names_are_the_new_ones() -> None:
    args = GRPOConfig(output_dir="x", vllm_importance_sampling_cap=2.5, scale_rewards=False)
    assert (args.vllm_importance_sampling_clip_max, args.scale_rewards) == (2.5, "none")
    assert GRPOConfig(output_dir="x", scale_rewards=True).scale_rewards == "group"


# -- the command line -----------------------------------------------------------------------------------


@dataclasses.dataclass
class Script:
    model: str = "tiny"


@pytest.mark.parametrize("config", OURS, ids=named)
def test_a_command_line_is_made_of_them(config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    parser = HfArgumentParser((Script, config))
    script, args = parser.parse_args_into_dataclasses(
        [
            "--model", "other", "--output_dir", "out", "--learning_rate", "3e-4", "--max_steps", "7",
            "--model_init_kwargs", '{"revision": "main"}', "--gradient_checkpointing", "False",
            "--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr_rate": 0.1}',
        ]
    )  # fmt: skip
    assert script.model == "other"
    assert (args.output_dir, args.learning_rate, args.max_steps) == ("out", 3e-4, 7)
    assert args.model_init_kwargs == {"revision": "main"} and args.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    assert args.gradient_checkpointing is False
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses(["--help"])
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in fields_of(config) if name not in ("local_rank",))


def test_trls_own_parser_takes_them(tmp_path: Path) -> None:
    recipe = tmp_path / "config.yaml"
    recipe.write_text("output_dir: out\nnum_generations: 4\nloss_type: grpo\nreward_weights: [1.0, 0.5]\n")
    (args,) = trl.TrlParser((GRPOConfig,)).parse_args_and_config(
        ["--config", str(recipe), "--beta", "0.1", "--chat_template_kwargs", '{"enable_thinking": false}']
    )
    assert isinstance(args, GRPOConfig)
    assert (args.num_generations, args.loss_type, args.beta) == (4, "grpo", 0.1)
    assert args.reward_weights == [1.0, 0.5] and args.chat_template_kwargs == {"enable_thinking": False}


# -- the package --------------------------------------------------------------------------------------


def test_names_are_found_when_they_are_used() -> None:
    """`tests/test_imports.py` sees that importing the package imports none of them."""
    assert set(turnwise.__all__) <= set(dir(turnwise))
    for name in ("GRPOTrainer", "RLOOTrainer", "SFTTrainer", "RichProgressCallback"):
        assert getattr(turnwise, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'PPOTrainer'"):
        _ = turnwise.PPOTrainer


# -- the page -----------------------------------------------------------------------------------------


def test_the_page_has_the_present_tables() -> None:
    page = (ROOT / "docs/trl.md").read_text(encoding="utf-8")
    assert page == with_tables(page), "run python -m turnwise.compat.fields"


def test_the_tables_name_each_field_and_stand_between_markers() -> None:
    text = tables()
    for config in OURS:
        assert all(f"| `{name}` |" in text for name in fields_of(config))
    page = f"above\n{BEGIN}\nold\n{END}\nbelow\n"
    assert with_tables(page) == f"above\n{BEGIN}\n\n{text}\n{END}\nbelow\n"
    with pytest.raises(ValueError, match="has no"):
        with_tables("nothing here")
