"""What must be cleaned up when this process ends, however it ends.

`atexit` does not run on SIGKILL, nor on SIGTERM without a handler. A watcher does: it reads from a pipe that
this process never writes to, and the end of the pipe is the end of this process.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

WATCH = 'cat > /dev/null; exec "$@"'
"""``cat`` ends with the pipe. Children of a bare ``os.fork`` hold the pipe open, and are waited for too."""


class Guard:
    """Runs ``command`` when this process ends, unless it was let go before.

    Guard(["docker", "rm", "--force", "turnwise-echo-1f0c"])
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._watcher: subprocess.Popen[bytes] | None = subprocess.Popen(
            ["/bin/sh", "-c", WATCH, "turnwise-guard", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C in the terminal is for this process, not for the watcher
        )

    def let_go(self) -> None:
        """There is nothing to clean up any more. May be called twice."""
        watcher, self._watcher = self._watcher, None
        if watcher is None:
            return
        watcher.kill()
        watcher.wait()
        if watcher.stdin is not None:
            watcher.stdin.close()
