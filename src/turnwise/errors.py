"""Error types, one for each boundary, and `boundary()`, the only place where foreign exceptions are caught.

What users can cause is a `TurnwiseError`, most of which are also the standard type that callers expect
(`ValueError`, `OSError`). Messages say what was found, what is allowed and what to do next.
"""

from __future__ import annotations

import traceback


class TurnwiseError(Exception):
    """Base of every error that Turnwise raises on purpose."""


class RecipeError(TurnwiseError, ValueError):
    """A recipe that cannot mean what it says: unknown key, wrong type, a setting that does nothing."""


class TaskError(TurnwiseError, ValueError):
    """A task row that cannot be used: not JSON, or naming no known environment."""


class TemplateError(TurnwiseError, ValueError):
    """A chat template that cannot do what the run asks of it."""


class ImageError(TurnwiseError, ValueError):
    """What should be an image is none, or none that the model's image processor takes."""


class MissingExtraError(TurnwiseError, ImportError):
    """An optional dependency is not installed; the message names the extra."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package '{package}': pip install 'turnwise[{extra}]'")


class StoreError(TurnwiseError, OSError):
    """The run directory could not be read or written; what was finished before is intact."""


class EnvSpecError(TurnwiseError, ValueError):
    """An environment that cannot be made: unknown name or argument, no environment, a tool without types."""


class EnvError(TurnwiseError):
    """An environment failed outside of the policy's control: its reset, its constructor, its scoring."""


class EnvLostError(EnvError):
    """Something is gone that the policy cannot reach: a dead server, a judge that does not answer.

    Authors may raise it from any method, and from reward functions: it says that the fault was nobody's here,
    and the episode is left out of the baseline whatever the policy did before.
    """


class UnscoredError(EnvLostError):
    """An environment could not say what its episode is worth, which is nobody's fault in it.

    Its own code raised, so that another try would end as this one did.
    """


class EnvCrashedError(EnvError):
    """The environment's own process died: while a call ran it was that call's doing."""


class ActionError(TurnwiseError, ValueError):
    """An action that an environment behind a server does not take; nothing was done."""


class EnvHungError(EnvError):
    """A call passed its deadline and could not be stopped: the environment cannot be used any more."""


class EngineError(TurnwiseError):
    """An engine failed: its worker died, a request could not be served."""


class ContextOverflowError(TurnwiseError, ValueError):
    """The context does not fit the budget. ``found`` and ``allowed`` are in tokens."""

    def __init__(self, found: int, allowed: int, what: str) -> None:
        super().__init__(f"{what} has {found} tokens; {allowed} fit")
        self.found, self.allowed = found, allowed


class PolicyError(TurnwiseError):
    """A policy could not answer: an endpoint's error, a script that ran out."""


class RolloutError(TurnwiseError, ValueError):
    """A rollout function returned what is no rollout: a length, a type, a log probability that is missing."""


class ScoringError(TurnwiseError):
    """A reward could not be had: it raised, hung, or was not a finite number."""


class AnswerError(ScoringError, ValueError):
    """A reward function returned what is no list with one score for each completion."""


class LearnError(TurnwiseError, ValueError):
    """A trajectory, a batch or a checkpoint that cannot be learned from as it is."""


class NonFiniteError(TurnwiseError, ArithmeticError):
    """A loss or a gradient was infinite or no number: the update was refused, the weights are unchanged."""


class TooManyFailuresError(TurnwiseError):
    """The error budget is used up; the run stops with everything finished on disk."""


class boundary:
    """Turn any foreign exception into ``error``, saying where it came from.

    Errors of ours pass unchanged, and so do cancellation, `KeyboardInterrupt` and `SystemExit`.

        async with asyncio.timeout(limit):
            with boundary(EnvError, f"environment {name}: reset"):
                observation = env.reset(task)
    """

    __slots__ = ("error", "where")

    def __init__(self, error: type[TurnwiseError], where: str) -> None:
        self.error, self.where = error, where

    def __enter__(self) -> None:
        """Nothing is needed."""

    def __exit__(self, kind: type[BaseException] | None, cause: BaseException | None, _: object) -> None:
        """Raise ``error`` in a foreign exception's place."""
        if isinstance(cause, Exception) and not isinstance(cause, TurnwiseError):
            raise self.error(f"{self.where}: {said(cause)}") from cause


def said(error: BaseException, limit: int | None = 2000) -> str:
    """``ValueError: no such thing``: an error's kind and its message."""
    text = message_of(error, limit)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def message_of(error: BaseException, limit: int | None = 2000) -> str:
    """An error's message, of which ``limit`` characters are kept.

    Foreign messages may be as long as the value that they quote, and making one may raise in its turn.
    """
    try:
        text = str(error)
    except Exception as broken:  # noqa: BLE001 - the error's own code, which is as foreign as what raised it
        return f"(its message could not be read: {type(broken).__name__})"
    return text if limit is None or len(text) <= limit else f"{text[:limit]}…"


def describe(error: BaseException, limit: int = 4000) -> str:
    """The traceback of ``error`` and its causes; of one longer than ``limit`` characters, the end."""
    text = "".join(traceback.format_exception(error))
    return text if len(text) <= limit else "…" + text[-limit:]
