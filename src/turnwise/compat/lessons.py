"""Data sets of TRL's `SFTTrainer` as rows of tokens, with the loss where its arguments want it.

    row                                             loss, by itself         assistant_only_loss
    {"messages": […], "tools": […]}                 every token             what the assistant says
    {"prompt": […], "completion": […]}              the completion          what the assistant says in it
    {"prompt": "…", "completion": "…"}              the completion          –
    {"text": "…"}                                   every token             –
    {"input_ids": […], "labels": […]}               where labels are        –

Whole conversations are rendered by the tokenizer's own template. With ``assistant_only_loss`` each reply is
rendered as the policy would have said it, by the renderer that plays and evaluates: any template will do,
with generation tags or without, and one that rewrites earlier turns makes a row of its own for those.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from turnwise.chat.base import Renderer
from turnwise.envs.opening import opening
from turnwise.errors import TaskError, TemplateError, boundary
from turnwise.learn.samples import Demonstrations
from turnwise.types import (
    BoolArray,
    IntArray,
    Message,
    Sample,
    Segment,
    StopReason,
    ToolSchema,
    Trajectory,
    Turn,
)

ENV = "train_dataset"
"""What the data set is called among a recipe's environments."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """One row of tokens.

    Lesson(ids_T=[5, 6, 7, 8], loss_T=[False, False, True, True])        # 5 and 6 are only read

    Whether its first token has loss only shows when it is known to follow another row's (``wrapped``).
    """

    ids_T: IntArray
    loss_T: BoolArray

    def __len__(self) -> int:
        """Tokens."""
        return len(self.ids_T)

    def cut(self, part: slice) -> Lesson:
        """A part of it."""
        return Lesson(self.ids_T[part], self.loss_T[part])

    def sample(self, name: str) -> Sample:
        """For the learner, its weights yet to be set. The first token follows nothing: it is only read."""
        zeros_T = np.zeros(len(self), dtype=np.float32)
        loss_T = self.loss_T.copy()
        loss_T[:1] = False
        return Sample(
            token_ids_T=self.ids_T, loss_mask_T=loss_T, logprobs_T=zeros_T, advantages_T=zeros_T,
            weights_T=zeros_T, versions_T=np.full(len(self), -1, dtype=np.int32), trajectory_id=name,
            group_id=name, env=ENV,
        )  # fmt: skip


def _lesson(ids: Any, loss: Any) -> Lesson:
    return Lesson(np.asarray(ids, dtype=np.int32), np.asarray(loss, dtype=np.bool_))


class Lessons:
    """Makes lessons of rows.

    Args:
        processing: The model's tokenizer or processor.
        renderer: Of the run; None where nothing is a conversation.
        text_column: ``dataset_text_field``.
        assistant_only: ``assistant_only_loss``.
        completion_only: ``completion_only_loss``.
    """

    def __init__(
        self,
        processing: Any,
        renderer: Renderer | None,
        *,
        text_column: str = "text",
        assistant_only: bool = False,
        completion_only: bool | None = None,
    ) -> None:
        self._tokenizer = getattr(processing, "tokenizer", processing)
        self._renderer = renderer
        self._demonstrations = None if renderer is None else Demonstrations(renderer)
        self._text_column = text_column
        self._assistant_only, self._completion_only = assistant_only, completion_only

    def of(self, rows: Iterable[Mapping[str, Any]], what: str) -> list[list[Lesson]]:
        """The lessons of each row: one, or more where the template rewrites what came before.

        Raises:
            TaskError: A row is none of the above, or asks for what it has not; the message says which.
            TemplateError: The template cannot render it.
        """
        return [self._row(row, f"{what}, row {number}") for number, row in enumerate(rows)]

    def _row(self, row: Mapping[str, Any], where: str) -> list[Lesson]:
        if any(row.get(column) is not None for column in ("image", "images")):
            raise TaskError(f"{where}: holds images, and SFTTrainer reads text; train with GRPOTrainer")
        if row.get("input_ids") is not None:
            return [self._tokenized(row)]
        messages = row.get("messages") or row.get("conversations")
        prompt, completion = row.get("prompt"), row.get("completion")
        if isinstance(completion, list):
            return self._conversation(row, _chat(prompt), _chat(completion), where)
        if messages is not None:
            if self._completion_only:
                raise TaskError(
                    f"{where}: completion_only_loss is for rows with a prompt and a completion; use "
                    "assistant_only_loss for conversations"
                )
            return self._conversation(row, [], _chat(messages), where)
        if self._assistant_only:
            raise TaskError(f"{where}: assistant_only_loss is for conversations, and this row is none")
        if isinstance(prompt, str) and isinstance(completion, str):
            return [self._completed(self._read(prompt), self._read(self._ended(prompt + completion)))]
        if isinstance(text := row.get(self._text_column), str):
            ids = self._read(self._ended(text))
            return [_lesson(ids, [True] * len(ids))]
        raise TaskError(
            f"{where}: has {', '.join(row) or 'nothing'}; expected messages, prompt and completion, or "
            f"'{self._text_column}' (dataset_text_field)"
        )

    def _tokenized(self, row: Mapping[str, Any]) -> Lesson:
        ids = row["input_ids"]
        if (labels := row.get("labels")) is not None:
            return _lesson(ids, [label != -100 for label in labels])
        loss = [True] * len(ids)
        masks = (
            ("assistant_masks", True),
            ("completion_mask", self._completion_only is not False),
        )
        for column, applies in masks:
            if applies and row.get(column) is not None:
                loss = [one and bool(other) for one, other in zip(loss, row[column], strict=True)]
        return _lesson(ids, loss)

    def _conversation(
        self, row: Mapping[str, Any], prompt: list[Any], completion: list[Any], where: str
    ) -> list[Lesson]:
        tools = row.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        if self._assistant_only:
            before = prompt if self._completion_only is not False else []
            return self._said(before, [*prompt, *completion][len(before) :], tools or [], where)
        settings = {"tools": tools or None, **(row.get("chat_template_kwargs") or {})}
        whole = self._rendered([*prompt, *completion], where, **settings)
        if not prompt:
            return [_lesson(whole, [True] * len(whole))]
        return [self._completed(self._rendered(prompt, where, add_generation_prompt=True, **settings), whole)]

    def _completed(self, prompt: list[int], whole: list[int]) -> Lesson:
        """Loss from where the completion begins: tokens may have merged across that place."""
        start = 0 if self._completion_only is False else common_length(prompt, whole)
        return _lesson(whole, [place >= start for place in range(len(whole))])

    def _said(
        self, before: Sequence[Any], rest: Sequence[Any], tools: Sequence[Any], where: str
    ) -> list[Lesson]:
        """Loss on the assistant's messages among ``rest``, each rendered as it would have been sampled."""
        assert self._demonstrations is not None
        with boundary(TaskError, where):
            known = opening(before, None) if before else []
            said = opening(rest, None)
            schemas = tuple(_schema(tool) for tool in tools)
        assert isinstance(known, list) and isinstance(said, list)
        segments = list(_segments(known, said))
        if not segments:
            raise TaskError(f"{where}: the assistant says nothing, so there is nothing to learn")
        trajectory = Trajectory(
            id=where, group_id=where, env=ENV, task={}, seed=0, tools=schemas, segments=tuple(segments),
            rewards={}, stop_reason=StopReason.ANSWERED, policy="data",
        )  # fmt: skip
        with boundary(TemplateError, where):
            samples = self._demonstrations.samples(trajectory)
        return [Lesson(one.token_ids_T, one.loss_mask_T) for one in samples]

    def _rendered(self, messages: list[Any], where: str, **settings: Any) -> list[int]:
        with boundary(TemplateError, where):
            ids: list[int] = self._tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=False, **settings
            )
        return ids

    def _read(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text).input_ids
        return ids

    def _ended(self, text: str) -> str:
        end: str = self._tokenizer.eos_token
        return text if text.endswith(end) else text + end


def _chat(messages: Any) -> list[Any]:
    """Messages under the names of the field, whatever the data set calls them."""
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    names = {"from": "role", "value": "content"}
    return [
        {names.get(key, key): value for key, value in message.items() if value is not None}
        for message in messages or []
    ]


def _segments(known: Sequence[Message], said: Sequence[Message]) -> Iterator[Segment]:
    """Replies with what followed each; where two follow each other, the second begins a segment."""
    prompt = list(known)
    turns: list[Turn] = []
    answered = True
    for place, message in enumerate(said):
        if message.role != "assistant":
            if not turns:
                prompt.append(message)
            answered = True
            continue
        if not answered:
            yield Segment(prompt=tuple(prompt), turns=tuple(turns))
            prompt, turns = [*known, *said[:place]], []
        following = []
        for other in said[place + 1 :]:
            if other.role == "assistant":
                break
            following.append(other)
        turns.append(Turn(message=message, feedback=tuple(following)))
        answered = False
    if turns:
        yield Segment(prompt=tuple(prompt), turns=tuple(turns))


def _schema(tool: Mapping[str, Any]) -> ToolSchema:
    """A tool as OpenAI writes it, the envelope left out or not."""
    function = tool.get("function", tool)
    return ToolSchema(
        name=function["name"],
        description=function.get("description") or "",
        parameters=function.get("parameters") or {"type": "object", "properties": {}},
    )


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How long two rows are the same."""
    for place, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return place
    return min(len(one), len(other))


# -- length -------------------------------------------------------------------------------------------


def truncated(lessons: Iterable[Lesson], most: int | None, *, end: bool = False) -> list[Lesson]:
    """Each at most ``most`` tokens long, those left out whose loss was cut off.

    Args:
        lessons: Of one row.
        most: ``max_length``; None cuts nothing.
        end: Keep the end (``truncation_mode="keep_end"``), not the start.
    """
    part = slice(None) if most is None else slice(-most, None) if end else slice(None, most)
    return [one for lesson in lessons if (one := lesson.cut(part)).loss_T.any()]


def packed(lessons: Sequence[Lesson], most: int, strategy: str) -> list[list[Lesson]]:
    """Rows of at most ``most`` tokens: best-fit decreasing, as TRL's, over a thousand lessons at a time.

    Args:
        lessons: In their order.
        most: ``max_length``.
        strategy: ``bfd`` cuts what is longer, ``bfd_split`` makes lessons of the rest, ``wrapped`` cuts one
            long row of all of them, whose documents see each other.
    """
    rows: list[list[Lesson]] = []
    for start in range(0, len(lessons), 1000):
        batch = [one for one in lessons[start : start + 1000] if len(one)]
        if strategy == "wrapped":
            ids_T = np.concatenate([one.ids_T for one in batch])
            loss_T = np.concatenate([one.loss_T for one in batch])
            rows += [[_lesson(ids_T[i : i + most], loss_T[i : i + most])] for i in range(0, len(ids_T), most)]
            continue
        stop = most if strategy == "bfd" else None
        parts = [one.cut(slice(i, i + most)) for one in batch for i in range(0, stop or len(one), most)]
        rows += _best_fit(parts, most)
    return rows


def _best_fit(lessons: Sequence[Lesson], most: int) -> Iterator[list[Lesson]]:
    """From the longest to the shortest, each into the fullest row that still holds it."""
    rows: list[list[Lesson]] = []
    room: dict[int, list[int]] = {}
    for place in sorted(range(len(lessons)), key=lambda i: -len(lessons[i])):
        size = len(lessons[place])
        left = min((free for free in room if free >= size and room[free]), default=None)
        if left is None:
            left, row = most, len(rows)
            rows.append([])
        else:
            row = room[left].pop(0)
        rows[row].append(lessons[place])
        room.setdefault(left - size, []).append(row)
    yield from rows
