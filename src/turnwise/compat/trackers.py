"""Where logs go beside ``state.log_history``: trackio, wandb, tensorboard, and what else transformers knows.

    callbacks = trackers(args.report_to)
    show(callbacks, Completions(step=4, columns={"prompt": …, "completion": …, "reward": …}, episodes=played))

Metrics are sent by transformers' own callbacks. What is added is a table of the episodes that are shown, and
traces with each reply and tool call where the tracker has a place for them. Nothing leaves the machine unless
it is asked for: trackio makes no Space of a Hub push, wandb keeps its run in a directory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import (
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
    get_reporting_integration_callbacks,
)

from turnwise.errors import MissingExtraError, RecipeError
from turnwise.types import Message, Trajectory

SHOWN_IN_TENSORBOARD = 8
"""Rows of its table, which is text and cannot be searched or sorted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completions:
    """What is shown of a step's episodes."""

    step: int
    """``state.global_step``."""
    columns: Mapping[str, Sequence[Any]]
    """By name, one value a row: prompt, completion, each reward, what reward functions logged, advantage."""
    episodes: Sequence[Trajectory] = ()
    """For trackers that show conversations with their tool calls and times."""


def trackers(report_to: Iterable[str]) -> list[TrainerCallback]:
    """A callback for each name of ``TrainingArguments.report_to``, as that has resolved it.

    Raises:
        MissingExtraError: The package of one is not installed.
        RecipeError: The same, of one that transformers knows and we do not.
    """
    return [_tracker(name) for name in report_to]


def show(callbacks: Iterable[TrainerCallback], completions: Completions) -> None:
    """Give the episodes to each callback that has a place for them."""
    for callback in callbacks:
        if isinstance(callback, Trackio | Wandb | TensorBoard):
            callback.show(completions)


class Trackio(TrackioCallback):  # type: ignore[misc]  # transformers has no types
    """Metrics, the completions table, and a trace of each episode."""

    def show(self, completions: Completions) -> None:
        """Log a table and traces at the present step."""
        logged: dict[str, Any] = {
            "completions": self._trackio.Table(
                columns=list(completions.columns), data=_rows(completions.columns)
            )
        }
        if completions.episodes:
            logged["episodes"] = [
                self._trackio.Trace(
                    messages=conversation(one), metadata=_metadata(one, completions.step), spans=spans(one)
                )
                for one in completions.episodes
            ]
        self._trackio.log(logged)

    def on_push_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        """Put the run into a Space only where the arguments name one: pushing a model is no wish for that."""
        if args.trackio_static_space_id:
            super().on_push_begin(args, state, control, model, **kwargs)


class Wandb(WandbCallback):  # type: ignore[misc]  # transformers has no types
    """Metrics and the completions table; offline unless ``WANDB_MODE`` says otherwise."""

    def setup(self, args: Any, state: Any, model: Any, **kwargs: Any) -> None:
        """Begin an offline run under the output directory, where none was begun."""
        if self._wandb.run is None and "WANDB_MODE" not in os.environ and state.is_world_process_zero:
            self._wandb.init(
                mode="offline",
                dir=args.output_dir,
                project=os.getenv("WANDB_PROJECT", "huggingface"),
                name=args.run_name,
            )
        super().setup(args, state, model, **kwargs)

    def show(self, completions: Completions) -> None:
        """Log a table at the present step."""
        columns = {
            name: [_text(value) if isinstance(value, list | dict) else value for value in values]
            for name, values in completions.columns.items()
        }
        table = self._wandb.Table(columns=list(columns), data=_rows(columns), allow_mixed_types=True)
        self._wandb.log({"completions": table, "train/global_step": completions.step})


class TensorBoard(TensorBoardCallback):  # type: ignore[misc]  # transformers has no types
    """Metrics, and the first completions as text."""

    def show(self, completions: Completions) -> None:
        """Write a table of `SHOWN_IN_TENSORBOARD` rows."""
        names = list(completions.columns)
        lines = [names, ["---"] * len(names), *_rows(completions.columns)[:SHOWN_IN_TENSORBOARD]]
        table = "\n".join("|" + "|".join(_cell(value) for value in line) + "|" for line in lines)
        if self.tb_writer is not None:
            self.tb_writer.add_text("completions", table, completions.step)
            self.tb_writer.flush()


_OURS: Mapping[str, type[TrainerCallback]] = {"trackio": Trackio, "wandb": Wandb, "tensorboard": TensorBoard}


def _tracker(name: str) -> TrainerCallback:
    if name == "wandb" and "WANDB_MODE" not in os.environ:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # Read when wandb is imported.
    try:
        if name in _OURS:
            return _OURS[name]()
        return get_reporting_integration_callbacks([name])[0]()
    except ValueError as unknown:
        raise RecipeError(f"report_to: {unknown} 'none' reports to none") from None
    except RuntimeError as missing:  # What transformers raises without the package.
        if name in _OURS:
            raise MissingExtraError(name, name, f"report_to={name}") from missing
        raise RecipeError(f"report_to names {name}: {missing}") from missing


# -- episodes -----------------------------------------------------------------------------------------


def conversation(episode: Trajectory) -> list[dict[str, Any]]:
    """An episode's messages as OpenAI writes them, calls and results joined by ids."""
    segments = episode.segments
    return [_message(message) for message in (segments[-1].messages if segments else ())]


def _message(message: Message) -> dict[str, Any]:
    out: dict[str, Any] = {"role": message.role, "content": message.text}
    if message.reasoning:
        out["reasoning_content"] = message.reasoning
    if message.tool_calls:
        out["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.raw or json.dumps(dict(call.arguments))},
            }
            for call in message.tool_calls
        ]
    if message.role == "tool":
        out |= {"tool_call_id": message.tool_call_id, "name": message.name}
    return out


def spans(episode: Trajectory) -> list[dict[str, Any]]:
    """How long each reply took, and what the environment did in between."""
    out: list[dict[str, Any]] = []
    for number, turn in enumerate(episode.turns):
        reply = f"{episode.id}/t{number}"
        tokens = {"prompt_tokens": len(turn.context_ids or ()), "completion_tokens": len(turn.ids or ())}
        out.append(
            {
                "id": reply, "name": f"reply {number}", "kind": "generation", "usage": tokens,
                "duration_ms": round(1000 * turn.policy_seconds, 3), "output": turn.message.text,
            }
        )  # fmt: skip
        out += [
            {
                "id": f"{reply}/{place}", "parent_id": reply, "name": result.call.name, "kind": "tool",
                "status": "ok" if result.error is None else "error", "error": result.error,
                "duration_ms": round(1000 * result.seconds, 3),
            }
            for place, result in enumerate(turn.tool_results)
        ]  # fmt: skip
    return out


def _metadata(episode: Trajectory, step: int) -> dict[str, Any]:
    return {
        "session_id": episode.group_id,
        "episode": episode.id,
        "environment": episode.env,
        "step": step,
        "reward": episode.reward,
        "rewards": {name: reward.value for name, reward in episode.rewards.items()},
        "stop_reason": str(episode.stop_reason),
        "status": "error" if episode.stop_reason.failed else "ok",
        "duration_ms": round(1000 * episode.seconds, 3),
    }


# -- tables -------------------------------------------------------------------------------------------


def _rows(columns: Mapping[str, Sequence[Any]]) -> list[list[Any]]:
    return [list(row) for row in zip(*columns.values(), strict=True)]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _cell(value: Any) -> str:
    """A value inside of a Markdown table."""
    return _text(value).replace("\n", " ").replace("|", "\\|")
