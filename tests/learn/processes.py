"""Several processes on this machine, as torchrun would start them: what each returns, or that it died."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

FORKED = multiprocessing.get_context("forkserver")
# Imported once in the server, so that a process begins to work at once.
FORKED.set_forkserver_preload(
    [
        "turnwise.learn.worker", "turnwise.pipeline.learning", "tests.learn.parallel_cases",
        "torch.distributed.fsdp", "transformers.models.qwen3.modeling_qwen3",
    ]
)  # fmt: skip


def together(count: int, work: Callable[..., Any], *args: Any, seconds: float = 120) -> list[Any]:
    """``work(*args)`` in ``count`` processes: what each returned, or its exit code if it ended otherwise.

    Raises:
        AssertionError: One hangs, or raised: its traceback.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    pipes = [FORKED.Pipe(duplex=False) for _ in range(count)]
    processes = [
        FORKED.Process(target=_run, args=(rank, count, port, pipe, work, args))
        for rank, (_, pipe) in enumerate(pipes)
    ]
    for process, (_, pipe) in zip(processes, pipes, strict=True):
        process.start()
        pipe.close()
    found_values: list[Any] = []
    try:
        for process, (receive, _) in zip(processes, pipes, strict=True):
            assert receive.poll(seconds), f"process {len(found_values)} of {count} hangs"
            try:
                kind, value = receive.recv()
            except EOFError:
                process.join(20)
                kind, value = "exit", process.exitcode
            assert kind != "raised", f"process {len(found_values)}: {value}"
            found_values.append(value)
    finally:
        for process in processes:
            process.join(20 if len(found_values) == count else 0)
            if process.exitcode is None:
                process.kill()
    return found_values


def _run(
    rank: int, count: int, port: int, pipe: Connection, work: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    try:
        value = work(*args)
    except Exception:  # noqa: BLE001 - told to the test
        pipe.send(("raised", traceback.format_exc()))
    else:
        pipe.send(("returned", value))
