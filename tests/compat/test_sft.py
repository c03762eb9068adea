"""`SFTTrainer` beside TRL's: the same rows, the same order, the same losses, update by update."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import PrinterCallback, TrainerCallback

from tests.support.models import tiny_qwen3
from tests.support.tokenizers import tiny_tokenizer, trl_template
from turnwise import SFTConfig, SFTTrainer
from turnwise.chat.renderer import builtin_template, load_renderer
from turnwise.compat.course import Course
from turnwise.compat.lessons import Lesson, Lessons, packed, truncated
from turnwise.errors import RecipeError, TaskError

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "move",
            "description": "Move.",
            "parameters": {
                "type": "object",
                "properties": {"direction": {"type": "string"}},
                "required": ["direction"],
            },
        },
    }
]


def conversation(number: int) -> list[dict[str, Any]]:
    """One to three calls, then the last word."""
    rng = random.Random(number)
    messages: list[dict[str, Any]] = [{"role": "user", "content": f"ball {number} paddle {number % 3}"}]
    for place in range(1 + number % 3):
        call = {"name": "move", "arguments": {"direction": rng.choice(["left", "right"])}}
        messages += [
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
            {"role": "tool", "name": "move", "content": f"ball {place}"},
        ]
    return [*messages, {"role": "assistant", "content": "Done."}]


TALKS = [conversation(number) for number in range(11)]
CHAT = [{"messages": talk, "tools": TOOLS} for talk in TALKS]
COMPLETIONS = [{"prompt": talk[:-1], "completion": talk[-1:], "tools": TOOLS} for talk in TALKS]
TEXTS = [{"text": " ".join(["word"] * (3 + number))} for number in range(11)]
PAIRS = [{"prompt": f"question {number}: ", "completion": f"answer {number} of it"} for number in range(11)]


def tokenizer(template: str | None = None) -> Any:
    return tiny_tokenizer(
        template or builtin_template("tiny"), texts=["ball paddle left right"], vocab_size=400
    )


def trainer(made: type, config: type, directory: Path, rows: Any, **changes: Any) -> Any:
    """A trainer of either library, on a new copy of the same model."""
    words = changes.pop("processing_class", None) or tokenizer()
    model = changes.pop("model", None) or tiny_qwen3(vocab=len(words), hidden=32)
    model.config.pad_token_id, model.config.eos_token_id = words.pad_token_id, words.eos_token_id
    extra = {
        name: changes.pop(name) for name in ("callbacks", "peft_config", "formatting_func") if name in changes
    }
    settings = {
        "use_cpu": True, "bf16": False, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 3, "learning_rate": 1e-3, "num_train_epochs": 2, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, **changes,
    }  # fmt: skip
    data = Dataset.from_list(rows) if isinstance(rows, list) else rows
    one = made(
        model=model,
        args=config(output_dir=str(directory), **settings),
        train_dataset=data,
        eval_dataset=None if isinstance(data, IterableDataset) else data,
        processing_class=words,
        **extra,
    )
    one.remove_callback(PrinterCallback)
    return one


def ours(directory: Path, rows: Any, **changes: Any) -> Any:
    return trainer(SFTTrainer, SFTConfig, directory, rows, **changes)


def theirs(directory: Path, rows: Any, **changes: Any) -> Any:
    import trl

    return trainer(trl.SFTTrainer, trl.SFTConfig, directory, rows, **changes)


def course(one: Any) -> list[dict[str, Any]]:
    """Losses of an evaluation before, of each update, and of an evaluation after."""
    before = one.evaluate()["eval_loss"]
    one.train()
    after = one.evaluate()["eval_loss"]
    names = ("step", "epoch", "loss", "grad_norm", "learning_rate", "num_tokens", "entropy")
    lines = [{name: line[name] for name in names} for line in one.state.log_history if "loss" in line]
    return [{"before": before, "after": after}, *lines]


CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "conversations": (CHAT, {}),
    "what the assistant says": (CHAT, {"assistant_only_loss": True}),
    "completions": (COMPLETIONS, {}),
    "completions and prompts": (COMPLETIONS, {"completion_only_loss": False}),
    "what the assistant says in completions": (COMPLETIONS, {"assistant_only_loss": True}),
    "text": (TEXTS, {}),
    "text with completions": (PAIRS, {}),
    "cut": (CHAT, {"max_length": 60}),
    "cut, the assistant": (CHAT, {"max_length": 60, "assistant_only_loss": True}),
    "shuffled": (CHAT, {"shuffle_dataset": True}),
    "whole batches": (CHAT, {"dataloader_drop_last": True}),
    "in order": (CHAT, {"train_sampling_strategy": "sequential"}),
    "packed": (CHAT, {"packing": True, "max_length": 300}),
    "packed, split": (CHAT, {"packing": True, "max_length": 100, "packing_strategy": "bfd_split"}),
    "packed, wrapped": (CHAT, {"packing": True, "max_length": 128, "packing_strategy": "wrapped"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_loss_is_trls(case: str, tmp_path: Path) -> None:
    rows, settings = CASES[case]
    mine = course(ours(tmp_path / "ours", rows, **settings))
    other = course(theirs(tmp_path / "theirs", rows, **settings))
    assert len(mine) == len(other)
    for left, right in zip(mine, other, strict=True):
        assert left == pytest.approx(right, rel=1e-3, abs=1e-6)


def test_accuracy_is_trls(tmp_path: Path) -> None:
    def accuracies(one: Any) -> list[float]:
        one.train()
        return [line["mean_token_accuracy"] for line in one.state.log_history if "loss" in line]

    # TRL takes the mean over micro-batches, which have as many tokens or as few.
    settings = {"gradient_accumulation_steps": 1, "max_steps": 5, "learning_rate": 0.03}
    mine = accuracies(ours(tmp_path / "ours", CHAT, **settings))
    assert mine == pytest.approx(accuracies(theirs(tmp_path / "theirs", CHAT, **settings)), rel=0.02)
    assert mine[-1] > mine[0]


def test_losses_fall_and_the_model_is_saved(tmp_path: Path) -> None:
    one = ours(tmp_path, CHAT, assistant_only_loss=True, num_train_epochs=4, learning_rate=5e-3)
    untrained = one.evaluate()["eval_loss"]
    output = one.train()
    assert output.global_step == one.state.global_step == 12 and one.state.epoch == 4.0
    assert one.evaluate()["eval_loss"] < untrained - 1
    one.save_model(str(tmp_path / "model"))
    from transformers import AutoModelForCausalLM

    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for name, weight in one.model.state_dict().items():
        torch.testing.assert_close(saved.state_dict()[name], weight)


def test_adapters_alone_move(tmp_path: Path) -> None:
    from peft import LoraConfig

    one = ours(tmp_path, CHAT, peft_config=LoraConfig(r=4, target_modules="all-linear"), max_steps=2)
    before = {name: weight.clone() for name, weight in one.model.state_dict().items()}
    one.train()
    moved = {name for name, weight in one.model.state_dict().items() if not weight.equal(before[name])}
    assert moved and all("lora_" in name for name in moved)
    one.save_model(str(tmp_path / "model"))
    assert (tmp_path / "model" / "adapter_model.safetensors").exists()


class Watching(TrainerCallback):
    """Notes events, and stops where it is told to."""

    def __init__(self, stop: int | None = None) -> None:
        self.events: list[str] = []
        self.stop = stop

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.events.append(f"step {state.global_step}")
        control.should_training_stop = state.global_step == self.stop

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.events.append("evaluate")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.events.append("save")

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.events.append("epoch")


def test_callbacks_evaluations_and_checkpoints_come_in_their_order(tmp_path: Path) -> None:
    watching = Watching(stop=5)
    one = ours(
        tmp_path, CHAT, callbacks=[watching], eval_strategy="steps", eval_steps=2, save_strategy="steps",
        save_steps=2,
    )  # fmt: skip
    one.train()
    assert watching.events == [
        "step 1", "step 2", "evaluate", "save", "step 3", "epoch", "step 4", "evaluate", "save", "step 5",
        "epoch",
    ]  # fmt: skip
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}


def test_a_stopped_training_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole = ours(tmp_path / "whole", CHAT)
    whole.train()
    first = ours(tmp_path / "parts", CHAT, callbacks=[Watching(stop=4)], save_strategy="steps", save_steps=3)
    first.train()
    second = ours(tmp_path / "parts", CHAT, save_strategy="steps", save_steps=3)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 6
    for name, weight in whole.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[name], weight)


# -- rows -------------------------------------------------------------------------------------------------


def lessons(row: dict[str, Any], template: str | None = None, **settings: Any) -> list[Lesson]:
    words = tokenizer(template)
    [made] = Lessons(words, load_renderer(words), **settings).of([row], "rows")
    return made


def learned(one: Lesson, template: str | None = None) -> str:
    """The text that has loss."""
    return str(tokenizer(template).decode(one.ids_T[one.loss_T].tolist()))


def test_the_assistant_alone_is_learned_from() -> None:
    [one] = lessons(CHAT[1], assistant_only=True)
    call = '<tool_call>{{"name":"move","arguments":{{"direction":"{}"}}}}</tool_call><|im_end|>'
    moves = [message["tool_calls"][0]["function"]["arguments"]["direction"] for message in TALKS[1][1:-1:2]]
    assert learned(one) == "".join(call.format(move) for move in moves) + "Done.<|im_end|>"


def test_the_completion_alone_is_learned_from() -> None:
    [one] = lessons(COMPLETIONS[1])
    assert learned(one) == "Done.<|im_end|>"
    [one] = lessons(PAIRS[1])
    assert learned(one) == " answer 1 of it<|im_end|>"  # The prompt's last blank is one token with "a".
    [one] = lessons(COMPLETIONS[1], completion_only=False)
    assert one.loss_T.all()


def test_of_completions_the_assistants_words_in_them() -> None:
    [one] = lessons(COMPLETIONS[1], assistant_only=True)
    assert learned(one) == "Done.<|im_end|>"


def test_the_first_token_follows_nothing_and_is_only_read() -> None:
    [one] = lessons(TEXTS[0])
    assert one.sample("a").loss_mask_T.tolist() == [False] + [True] * (len(one) - 1)


def test_what_is_too_long_keeps_its_start_or_its_end() -> None:
    [one] = lessons(COMPLETIONS[1])
    assert truncated([one], len(one) - 2) != [] and truncated([one], 5) == []
    [kept] = truncated([one], 3, end=True)
    assert kept.ids_T.tolist() == one.ids_T[-3:].tolist() and kept.loss_T.all()


def test_a_template_without_generation_tags_will_do() -> None:
    """TRL asks for tags, and knows them for templates that it has a copy of."""
    template = trl_template("qwen3").replace("{%- set ns", "{#- mine -#}{%- set ns", 1)
    made = lessons(CHAT[0], template, assistant_only=True)
    said = "".join(learned(one, template) for one in made)
    assert said.count('"name": "move"') == 1 and said.endswith("Done.<|im_end|>")


def test_tools_may_be_json_and_calls_as_openai_writes_them() -> None:
    row = json.loads(json.dumps({"messages": TALKS[0], "tools": json.dumps(TOOLS)}))
    [one], [other] = lessons(row, assistant_only=True), lessons(CHAT[0], assistant_only=True)
    assert one.ids_T.tolist() == other.ids_T.tolist()


def test_two_replies_in_a_row_are_each_learned_once() -> None:
    talk = [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "One."},
        {"role": "assistant", "content": "Two."},
    ]
    made = lessons({"messages": talk}, assistant_only=True)
    assert [learned(one) for one in made] == ["One.<|im_end|>", "Two.<|im_end|>"]


def test_other_names_for_messages() -> None:
    other = [{"from": one["role"], "value": one["content"]} for one in TALKS[0] if "tool_calls" not in one]
    plain = [one for one in TALKS[0] if "tool_calls" not in one]
    [one], [two] = lessons({"conversations": other}), lessons({"messages": plain})
    assert one.ids_T.tolist() == two.ids_T.tolist()


def test_rows_of_tokens() -> None:
    [one] = lessons({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]})
    assert one.loss_T.tolist() == [False, True, True]
    [one] = lessons({"input_ids": [5, 6, 7], "completion_mask": [0, 0, 1]})
    assert one.loss_T.tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("row", "settings", "told"),
    [
        ({"question": "?"}, {}, "rows, row 0: has question; expected messages"),
        ({"text": "x"}, {"assistant_only": True}, "assistant_only_loss is for conversations"),
        (CHAT[0], {"completion_only": True}, "use assistant_only_loss"),
        ({"messages": [{"role": "user", "content": "x"}]}, {"assistant_only": True}, "says nothing"),
        ({"text": "x", "images": ["y"]}, {}, "holds images"),
    ],
)
def test_rows_that_cannot_be_learned_from(row: Any, settings: Any, told: str) -> None:
    with pytest.raises(TaskError, match=told):
        lessons(row, **settings)


def test_documents_in_a_row_do_not_see_each_other(tmp_path: Path) -> None:
    """Packed or not, one update over all rows is the same."""
    grad_norms = []
    for number, settings in enumerate(({}, {"packing": True, "max_length": 512})):
        one = ours(
            tmp_path / str(number), CHAT, per_device_train_batch_size=16, gradient_accumulation_steps=1,
            max_steps=1, **settings,
        )  # fmt: skip
        one.train()
        grad_norms.append(one.state.log_history[0]["grad_norm"])
    assert grad_norms[0] == pytest.approx(grad_norms[1], rel=1e-5)


def test_packing_fills_the_fullest_row() -> None:
    made = [
        Lesson(torch.arange(size).numpy(), torch.ones(size, dtype=torch.bool).numpy())
        for size in (5, 2, 3, 1)
    ]
    assert [[len(one) for one in row] for row in packed(made, 4, "bfd")] == [[4], [3, 1], [2]]
    assert [[len(one) for one in row] for row in packed(made, 4, "bfd_split")] == [[4], [3, 1], [2, 1]]
    assert [[len(one) for one in row] for row in packed(made, 4, "wrapped")] == [[4], [4], [3]]


# -- the rest of the contract -----------------------------------------------------------------------------


def test_an_epochs_last_update_takes_what_is_left() -> None:
    one = Course(11, micro=2, accumulated=2, whole=False, seed=0)
    assert one.updates == 3 and [len(one.update(i)) for i in range(3)] == [4, 4, 3]
    assert sorted(row for i in range(3, 6) for row in one.update(i)) == list(range(11))
    assert [list(one.update(i)) for i in range(3)] != [list(one.update(i)) for i in range(3, 6)]
    assert [one.done(i) for i in range(4)] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    whole = Course(11, micro=2, accumulated=2, whole=True, seed=None)
    assert [list(whole.update(i)) for i in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_stream_is_read_as_far_as_the_updates_go(tmp_path: Path) -> None:
    read = []

    def endless() -> Any:
        for number in range(1000):
            read.append(number)
            yield CHAT[number % len(CHAT)]

    stream = IterableDataset.from_generator(endless)
    one = ours(tmp_path, stream, max_steps=2)
    one.train()
    assert one.state.global_step == 2 and len(read) <= 9
    with pytest.raises(RecipeError, match="max_steps is needed"):
        ours(tmp_path, stream)


def test_text_needs_no_chat_template(tmp_path: Path) -> None:
    words = tokenizer()
    words.chat_template = None
    one = ours(tmp_path, TEXTS, processing_class=words, max_steps=1)
    one.train()
    assert one.state.log_history[0]["loss"] > 0


def test_a_function_may_make_the_text(tmp_path: Path) -> None:
    made: Callable[[dict[str, Any]], str] = lambda row: f"{row['prompt']}{row['completion']}"  # noqa: E731
    one = ours(tmp_path, PAIRS, formatting_func=made, max_steps=1)
    one.train()
    assert one.state.log_history[0]["num_tokens"] > 0


@pytest.mark.parametrize(
    ("keywords", "told"),
    [
        ({"data_collator": print}, "data_collator: pass train_dataset"),
        ({"compute_loss_func": print}, "compute_loss_func: the loss"),
        ({"train_dataset": None}, "train_dataset is needed"),
    ],
)
def test_what_is_not_taken_is_told(keywords: Any, told: str, tmp_path: Path) -> None:
    words = tokenizer()
    given = {"train_dataset": CHAT, **keywords}
    with pytest.raises(RecipeError, match=told):
        SFTTrainer(
            model=tiny_qwen3(vocab=len(words)),
            args=SFTConfig(output_dir=str(tmp_path)),
            processing_class=words,
            **given,
        )
