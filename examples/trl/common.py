"""What these scripts share: their flags, and the tiny policy that they train where no ``--model`` is named.

The policy is a Qwen3 of 200k parameters, made and taught offline in some ten seconds: it plays as the
script's teacher does, errors included, so that there is something left to learn.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import get_json_schema

from turnwise.chat.renderer import builtin_template
from turnwise.config import ScratchConfig
from turnwise.learn.scratch import blank_tokenizer, fit_tokenizer, write_model

Row = dict[str, Any]
Lesson = dict[str, Any]
Teacher = Callable[[Any], Iterator[tuple[str, dict[str, Any]]]]
"""Looks at an environment and says which tool to call, with which arguments, until it is done."""

HEADER, END = "<|im_start|>assistant\n", "<|im_end|>"
# How transformers, and so TRL, reads the calls of a template that it does not know.
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": HEADER,
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<\|im_end\|>|$", "content": "text"},
    },
}


def flags(
    doc: str | None, name: str, argv: Sequence[str] | None = None, *, servers: bool = False
) -> argparse.Namespace:
    """The command line of a script that is called ``name``; ``argv`` in its place in a notebook.

    With ``servers`` the script can play on an OpenEnv server too.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or directory; a tiny policy is made where it is not given")
    parser.add_argument("--max-steps", type=int, default=100)
    parser.add_argument("--output-dir", type=Path, default=Path("runs") / f"trl-{name}")
    parser.add_argument("--report-to", default="none", help="trackio, wandb, tensorboard")
    parser.add_argument("--vllm-mode", choices=("colocate", "server"), help="generate with vLLM")
    parser.add_argument("--vllm-server-url", help="http://host:port of a server, for --vllm-mode server")
    if servers:
        parser.add_argument("--env-host", help="an OpenEnv server to play on, in place of the class below")
        parser.add_argument("--env-port", type=int, help="of --env-host; 8000 if not given")
    args = parser.parse_args(argv)
    if servers and args.env_port is not None and not args.env_host:
        parser.error("--env-port goes with --env-host")
    if (args.vllm_server_url is not None) != (args.vllm_mode == "server"):
        parser.error("--vllm-server-url and --vllm-mode server go together")
    random.seed(0)  # What teachers say.
    return args


def factory(args: argparse.Namespace, own: type) -> type | str:
    """What a trainer plays on: the server of ``--env-host``, or the script's own class."""
    return f"http://{args.env_host}:{args.env_port or 8000}" if args.env_host else own


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags and the machine say of a `GRPOConfig`."""
    gpu = torch.cuda.is_available()
    vllm = {"use_vllm": True, "vllm_mode": args.vllm_mode} if args.vllm_mode else {}
    if args.vllm_server_url:
        vllm["vllm_server_base_url"] = args.vllm_server_url
    return {
        "output_dir": str(args.output_dir),
        "max_steps": args.max_steps,
        "report_to": args.report_to,
        "use_cpu": not gpu,
        "bf16": gpu,
        "logging_steps": 1,
        "save_strategy": "no",
        **vllm,
    }


def lesson(environment: Any, row: Row, teacher: Teacher) -> Lesson:
    """A teacher's conversation with an environment."""
    told = environment.reset(**row)
    *before, last = row["prompt"]
    messages = [*before, {**last, "content": last["content"] + (told or "")}]
    for name, arguments in teacher(environment):
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        answer = getattr(environment, name)(**arguments)
        messages.append({"role": "tool", "name": name, "content": str(answer)})
    methods = [name for name in vars(type(environment)) if not name.startswith("_")]
    tools = [
        get_json_schema(getattr(environment, name)) for name in methods if name not in ("reset", "get_reward")
    ]
    return {"messages": [*messages, {"role": "assistant", "content": "Done."}], "tools": tools}


def policy(args: argparse.Namespace, lessons: Iterable[Lesson], *, steps: int = 300) -> str:
    """``--model``, or the directory of a tiny policy that has learned from ``lessons`` in so many steps."""
    if args.model:
        return args.model  # type: ignore[no-any-return]
    directory = args.output_dir / "policy"
    if not (directory / "config.json").exists():
        print("making a tiny policy …", flush=True)
        teach(directory, list(lessons), steps=steps)
    return str(directory)


def teach(directory: Path, lessons: Sequence[Lesson], *, steps: int, batch: int = 16) -> None:
    """Write a tiny model that says what the assistants of ``lessons`` say."""
    template = builtin_template("tiny")
    blank = blank_tokenizer(template)
    texts = [
        blank.apply_chat_template(one["messages"], tools=one.get("tools"), tokenize=False) for one in lessons
    ]
    tokenizer = fit_tokenizer(texts, vocab_size=384, keep_apart=[], chat_template=template)
    tokenizer.response_template = RESPONSE_TEMPLATE
    size = ScratchConfig(hidden_size=64, layers=2, heads=4, kv_heads=2, head_dim=16, ffn_size=192)
    write_model(size, tokenizer, directory, max_context=2048, seed=0)

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    rng = random.Random(0)
    rows = [_labelled(tokenizer, text) for text in texts]
    for _ in range(steps):
        chosen = rng.choices(rows, k=batch)
        ids, labels = (
            torch.nn.utils.rnn.pad_sequence(column, batch_first=True, padding_value=fill)
            for column, fill in zip(zip(*chosen, strict=True), (tokenizer.pad_token_id, -100), strict=True)
        )
        model(input_ids=ids, labels=labels).loss.backward()  # padding is at the end: nothing sees it
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    model.save_pretrained(directory)


def _labelled(tokenizer: Any, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, and the same with -100 wherever the assistant does not speak."""
    ids: list[int] = []
    labels: list[int] = []
    before, *replies = text.split(HEADER)
    parts = [(before, False)]
    for reply in replies:
        said, _, after = reply.partition(END)
        parts += [(HEADER, False), (said + END, True), (after, False)]
    for part, own in parts:
        new = tokenizer(part, add_special_tokens=False).input_ids
        ids += new
        labels += new if own else [-100] * len(new)
    return torch.tensor(ids), torch.tensor(labels)
