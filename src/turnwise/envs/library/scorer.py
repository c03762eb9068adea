"""Scoring in a process of its own, for datasets whose scorer evaluates the answer as code.

``countdown`` hands the answer to sympy's ``parse_expr``, ``n_queens`` to ``eval``. The answer is the policy's
text: ``9**9**9`` there holds the interpreter's lock for hours, every thread and the event loop with it, and
code of any kind runs where the weights are. So one child process serves all environments here, and forks for
each answer; the fork has seconds and bytes to spend, and what it breaks is its own.

    parent ── {"dataset": …, "answer": …, "entry": …} ──> child ── fork, score, exit ──> {"score": 0.5}

This stops accidents and hangs. It is no sandbox: the fork may do what this user may do.
"""

from __future__ import annotations

import inspect
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any, Protocol

from turnwise.envs.library.entries import pack, unpack
from turnwise.errors import ScoringError, TurnwiseError, boundary

SECONDS = 5
"""For one answer. Right ones take milliseconds; sympy's integrals, tenths of a second."""
BYTES = 4 << 30
"""Address space of one fork."""
BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from turnwise.envs.library.scorer import serve; serve(int(sys.argv[1]))"
)


EVALUATING = ("eval(", "parse_expr(", "sympify(")
"""Calls in a dataset's ``score_answer`` that run the policy's text as code."""


class Scorer(Protocol):
    """What scores answers: a dataset of the package, or a process of its own that holds one."""

    def score_answer(self, answer: str | None, entry: dict[str, Any]) -> float:
        """How right ``answer`` is, from 0 to 1."""
        ...


def runs_answers(dataset: type[Scorer]) -> bool:
    """Whether scoring by this class runs the answer as code."""
    source = inspect.getsource(dataset.score_answer)
    return any(call in source for call in EVALUATING)


class ApartScorer:
    """Scores answers to one dataset's questions in the child.

    Args:
        dataset: Its name, seed, size and settings, from which the child makes it again.
    """

    def __init__(self, *dataset: str | int) -> None:
        self.dataset = dataset

    def warm_up(self) -> None:
        """Start the child, whose imports take seconds, without waiting for it."""
        _child.start()

    def score_answer(self, answer: str | None, entry: dict[str, Any]) -> float:
        """As the package scores it.

        Raises:
            ScoringError: The scorer raised, took too long or too much, or broke its process.
        """
        reply = _child.ask(
            {"dataset": self.dataset, "answer": answer, "entry": pack(entry), "seconds": SECONDS}
        )
        if "error" in reply:
            raise ScoringError(reply["error"])
        return float(reply["score"])


class _Child:
    """The child process, started at the first answer and again should it die."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wire: Connection | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, unless it runs; or unless it is being asked, and so runs or is started there."""
        if self._lock.acquire(blocking=False):
            try:
                self._connected()
            finally:
                self._lock.release()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The child's reply.

        Raises:
            ScoringError: The child died.
        """
        with self._lock:
            try:
                wire = self._connected()
                wire.send_bytes(json.dumps(request).encode())
                reply: dict[str, Any] = json.loads(wire.recv_bytes())
            except (EOFError, OSError) as lost:
                self._wire = None
                raise ScoringError("the process that scores answers died") from lost
        return reply

    def _connected(self) -> Connection:
        if self._wire is None:
            ours, theirs = socket.socketpair()
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", BOOT, str(theirs.fileno()), json.dumps(sys.path)],
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,  # Ctrl-C is the parent's affair; the child ends with its wire.
                )
            self._wire = Connection(ours.detach())
        return self._wire


_child = _Child()


def serve(descriptor: int) -> None:
    """The child's life: a fork for each request, until the parent is gone."""
    from turnwise.envs.library.reasoning_gym import dataset_of

    wire = Connection(descriptor)
    while True:
        try:
            request = json.loads(wire.recv_bytes())
            dataset_of(*request["dataset"])  # Made before the fork, so that it is made once.
            wire.send_bytes(_in_fork(request, descriptor))
        except (EOFError, OSError):
            return


def _in_fork(request: dict[str, Any], descriptor: int) -> bytes:
    reader, writer = os.pipe()
    fork = os.fork()
    if fork == 0:
        os.close(descriptor)
        os.close(reader)
        # The default action of an alarm ends the process, also in the middle of C code.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(request["seconds"])
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with os.fdopen(writer, "wb") as out:
            out.write(json.dumps(_score(request)).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as result:
        reply = result.read()
    _, status = os.waitpid(fork, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM:
        return json.dumps({"error": f"scoring took more than {request['seconds']} s"}).encode()
    return reply or json.dumps({"error": "scoring broke its process"}).encode()


def _score(request: dict[str, Any]) -> dict[str, Any]:
    from turnwise.envs.library.reasoning_gym import dataset_of

    try:
        with boundary(ScoringError, "score_answer"):
            entry = unpack(request["entry"])
            return {"score": float(dataset_of(*request["dataset"]).score_answer(request["answer"], entry))}
    except TurnwiseError as error:
        return {"error": str(error)}
