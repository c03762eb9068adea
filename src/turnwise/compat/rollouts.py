"""`read_rollouts`: what a ``rollout_func`` of TRL returned, checked, and cut where others wrote."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from turnwise.errors import RolloutError

REQUIRED = ("prompt_ids", "completion_ids", "logprobs")
READ = (*REQUIRED, "env_mask", "logprob_token_ids")
TAKEN = ("prompts", "completions", "trainer_state", "log_extra", "log_metric", "environments")
"""Keywords that reward functions are given already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One completion.

    prompt_ids [5, 6]   completion_ids [8, 9, 3, 4, 7, 2]   env_mask [1, 1, 0, 0, 1, 1]
    parts      ([8, 9], logprobs), ([3, 4], None), ([7, 2], logprobs)
    """

    prompt_ids: list[int]
    parts: tuple[tuple[list[int], list[float] | None], ...]
    """Runs of tokens in their order, with the log probabilities of those that the model wrote: none of these
    where the function says nothing of them."""
    columns: Mapping[str, Any]
    """For reward functions: all completion ids, and the fields that the function added."""
    seconds: float = 0.0
    """How long the call took that made it."""


def read_rollouts(answer: Any, count: int) -> list[Rollout]:
    """What the function returned for ``count`` prompts.

    ``logprobs`` has a number for each completion token, or a list of the most probable ones, as vLLM's client
    gives them, whose ids are in ``logprob_token_ids`` where there are several. Where ``env_mask`` is 0, which
    is what the model did not write, they are not looked at. None says nothing of any.

    Raises:
        RolloutError: Something is missing or of another length or type; the message says which and where.
    """
    if not isinstance(answer, Mapping):
        raise RolloutError(f"rollout_func returned {type(answer).__name__}; expected a dict with {_REQUIRED}")
    missing = [key for key in REQUIRED if key not in answer or (answer[key] is None and key != "logprobs")]
    if missing:
        raise RolloutError(f"rollout_func returned no {', '.join(missing)}; it must return {_REQUIRED}")
    columns = {key: _rows(answer[key], key, count) for key in READ if answer.get(key) is not None}
    extra = {key: value for key, value in answer.items() if key not in (*REQUIRED, "env_mask")}
    for key in TAKEN:
        if key in extra:
            raise RolloutError(
                f"rollout_func returned '{key}', which reward functions have already; rename it"
            )
    for key, value in extra.items():
        # As in TRL a list has one value for each, and anything else is everyone's.
        if isinstance(value, list):
            _rows(value, key, count)
    return [
        _rollout(
            n,
            {key: rows[n] for key, rows in columns.items()},
            {key: value[n] if isinstance(value, list) else value for key, value in extra.items()},
        )
        for n in range(count)
    ]


_REQUIRED = "prompt_ids, completion_ids and logprobs"


def _rows(value: Any, key: str, count: int) -> list[Any]:
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, list | tuple):
        raise RolloutError(f"rollout_func returned {key} as {type(value).__name__}; expected a list")
    if len(value) != count:
        raise RolloutError(
            f"rollout_func returned {len(value)} {key} for {count} prompts; prompts come repeated, once for "
            "each completion that is wanted: return one item for each"
        )
    return list(value)


def _rollout(n: int, row: Mapping[str, Any], extra: Mapping[str, Any]) -> Rollout:
    prompt_ids, ids = (_ids(row[key], f"{key}[{n}]") for key in ("prompt_ids", "completion_ids"))
    logprobs = _aligned(row["logprobs"], f"logprobs[{n}]", ids) if "logprobs" in row else None
    mask = _aligned(row["env_mask"], f"env_mask[{n}]", ids) if "env_mask" in row else [1] * len(ids)
    top = (
        _aligned(row["logprob_token_ids"], f"logprob_token_ids[{n}]", ids)
        if "logprob_token_ids" in row
        else None
    )
    parts: list[tuple[list[int], list[float] | None]] = []
    for t, (token, mine) in enumerate(zip(ids, mask, strict=True)):
        if mine not in (0, 1):
            raise RolloutError(f"env_mask[{n}][{t}] is {mine!r}; 1 is a token of the model and 0 is not")
        if not parts or (parts[-1][1] is not None) != bool(mine):
            parts.append(([], [] if mine else None))
        run, found = parts[-1]
        run.append(token)
        if found is not None and logprobs is not None:
            found.append(_logprob(logprobs[t], None if top is None else top[t], token, f"logprobs[{n}][{t}]"))
    if not any(mask):
        raise RolloutError(f"completion {n} has no token of the model: env_mask[{n}] is 0 throughout")
    return Rollout(prompt_ids=prompt_ids, parts=tuple(parts), columns={**extra, "completion_ids": ids})


def _plain(value: Any) -> Any:
    """Lists and numbers, whatever numpy or torch they are of."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _ids(value: Any, what: str) -> list[int]:
    value = _plain(value)
    if not isinstance(value, Sequence) or not value or not all(type(one) is int for one in value):
        found = "nothing" if isinstance(value, Sequence) and not value else f"{value!r:.60}"
        raise RolloutError(f"{what}: expected token ids, a list of one or more integers; found {found}")
    return list(value)


def _aligned(value: Any, what: str, ids: Sequence[int]) -> list[Any]:
    value = _plain(value)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise RolloutError(f"{what}: expected a list; found {type(value).__name__}")
    if len(value) != len(ids):
        raise RolloutError(f"{what} has {len(value)} entries for {len(ids)} completion_ids")
    return list(value)


def _logprob(value: Any, tokens: Any, token: int, what: str) -> float:
    """The sampled token's own, also where the most probable ones are given."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if tokens is not None and token in tokens:
            value = value[list(tokens).index(token)]
        elif len(value) == 1:
            value = value[0]
        else:
            raise RolloutError(
                f"{what} has {len(value)} entries, and nothing says which is token {token}'s: give that one "
                "alone, or the tokens in logprob_token_ids"
            )
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise RolloutError(
            f"{what} is {value!r}: each token of the model needs the log probability that it was drawn with; "
            "generate_rollout_completions gives them"
        )
    return float(value)
