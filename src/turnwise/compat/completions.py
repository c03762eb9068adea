"""Episodes that are shown at a log: a table in the terminal, a Parquet file, and what trackers have for them.

output_dir/completions/completions_00020.parquet        step, prompt, completion, rewards, …, advantage
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from turnwise.compat.metrics import mean
from turnwise.compat.trackers import Completions, show
from turnwise.errors import MissingExtraError
from turnwise.learn.credit import credit
from turnwise.pipeline.selection import Selector
from turnwise.types import Message, Trajectory, TrajectoryGroup

if TYPE_CHECKING:
    from turnwise.compat.trainer import OnlineTrainer

MOST_CHARACTERS = 2000
"""Of one conversation in the terminal; the file has all of it."""


def show_completions(trainer: OnlineTrainer, groups: Sequence[TrajectoryGroup]) -> None:
    """Episodes to the terminal, to a file, to the trackers."""
    args, step = trainer.args, trainer.state.global_step
    chosen = Selector(trainer.plan.recipe).select(groups).groups
    columns, episodes = columns_of(
        groups,
        advantages={id: mean(own) for id, own in credit(chosen, trainer.config).by_id.items()},
        extra=trainer.board.take_columns([one.id for group in groups for one in group.trajectories]),
        unique_prompts=args.log_unique_prompts,
    )
    print_table(columns, step=step, most=args.num_completions_to_print)
    write_table(columns, Path(args.output_dir) / "completions" / f"completions_{step:05d}.parquet", step=step)
    show(trainer.callback_handler.callbacks, Completions(step=step, columns=columns, episodes=episodes))


def columns_of(
    groups: Sequence[TrajectoryGroup],
    *,
    advantages: Mapping[str, float | None],
    extra: Mapping[str, Sequence[Any]],
    unique_prompts: bool = False,
) -> tuple[dict[str, list[Any]], list[Trajectory]]:
    """A table of episodes by column, and the episodes.

    Args:
        groups: Siblings side by side.
        advantages: By episode; those without are None.
        extra: What reward functions logged, one value for each episode in order.
        unique_prompts: One episode of each prompt.
    """
    episodes = [one for group in groups for one in group.trajectories]
    names = dict.fromkeys(name for one in episodes for name in one.rewards)
    table: dict[str, list[Any]] = {
        "prompt": [_prompt(one) for one in episodes],
        "completion": [_completion(one) for one in episodes],
        **{
            name: [one.rewards[name].value if name in one.rewards else None for one in episodes]
            for name in names
        },
        **{name: list(values) for name, values in extra.items()},
        "advantage": [advantages.get(one.id) for one in episodes],
    }
    if unique_prompts:
        seen = [json.dumps(prompt, sort_keys=True, default=str) for prompt in table["prompt"]]
        first = [i for i, prompt in enumerate(seen) if prompt not in seen[:i]]
        table = {name: [values[i] for i in first] for name, values in table.items()}
        episodes = [episodes[i] for i in first]
    return table, episodes


def print_table(columns: Mapping[str, Sequence[Any]], *, step: int, most: int | None = None) -> None:
    """Print the first rows of a table of episodes."""
    table = Table(expand=True, show_lines=True)
    for name in columns:
        numeric = all(isinstance(value, float | int | None) for value in columns[name])
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in list(zip(*columns.values(), strict=True))[:most]:
        table.add_row(*(_cell(value) for value in row))
    Console().print(Panel(table, title=f"step {step}", expand=False))


def write_table(columns: Mapping[str, Sequence[Any]], path: Path, *, step: int) -> None:
    """Write a table of episodes as Parquet.

    Raises:
        MissingExtraError: pyarrow is not installed.
    """
    try:
        import pyarrow  # type: ignore[import-untyped]  # it ships none
        from pyarrow import parquet
    except ImportError as cause:
        raise MissingExtraError("pyarrow", "trl", "log_completions, which writes Parquet files,") from cause

    def column(values: Sequence[Any]) -> Any:
        try:
            return pyarrow.array(values)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError):  # What a function logs may have any shape.
            return pyarrow.array([json.dumps(value, default=str) for value in values])

    path.parent.mkdir(parents=True, exist_ok=True)
    rows = len(next(iter(columns.values())))
    made = {"step": column([step] * rows), **{name: column(values) for name, values in columns.items()}}
    parquet.write_table(pyarrow.table(made), path)


def _prompt(episode: Trajectory) -> Any:
    if not episode.segments or not episode.segments[0].prompt:
        return episode.task.get("prompt")
    return [_message(message) for message in episode.segments[0].prompt]


def _completion(episode: Trajectory) -> list[dict[str, Any]]:
    return [_message(message) for turn in episode.turns for message in (turn.message, *turn.feedback)]


def _message(message: Message) -> dict[str, Any]:
    """A message for people, and of one shape for a table: images are marked, arguments are JSON text."""
    told = message.as_dict()
    if "tool_calls" in told:
        functions = [call["function"] for call in told["tool_calls"]]
        told["tool_calls"] = [
            {"name": one["name"], "arguments": json.dumps(one["arguments"])} for one in functions
        ]
    if message.reasoning:
        told["reasoning_content"] = message.reasoning
    if isinstance(told.get("content"), list):
        told["content"] = "".join(
            str(part.get("text", "")) if part.get("type") == "text" else "[image]" for part in told["content"]
        )
    return told


def _cell(value: Any) -> Text:
    if value is None:
        return Text("–", style="dim")
    if isinstance(value, float):
        return Text(f"{value:.3g}")
    if not (isinstance(value, list) and all(isinstance(one, dict) for one in value)):
        return Text(str(value))
    text = Text()
    for message in value:
        text.append(f"{message['role']}\n", style="bold")
        if message.get("reasoning_content"):
            text.append(f"{message['reasoning_content']}\n", style="italic dim")
        text.append(f"{message.get('content') or ''}\n")
        for call in message.get("tool_calls") or ():
            text.append(f"{call['name']}({call['arguments']})\n", style="cyan")
    if len(text) > MOST_CHARACTERS:
        text.truncate(MOST_CHARACTERS, overflow="ellipsis")
    return text
