"""`SyncEnvClient`: an `EnvClient` without ``await``."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from turnwise.openenv.client.background import run

if TYPE_CHECKING:
    from turnwise.openenv.client.env_client import EnvClient
    from turnwise.openenv.models import StepResult

ActT = TypeVar("ActT")
ObsT = TypeVar("ObsT")
StateT = TypeVar("StateT")


class SyncEnvClient(Generic[ActT, ObsT, StateT]):
    """Runs a client's methods on the event loop of a thread in the background, so also within another loop.

    Every further method of the client is here too, and is waited for where it is async.
    """

    def __init__(self, async_client: EnvClient[ActT, ObsT, StateT]) -> None:
        self._async = async_client

    @property
    def async_client(self) -> EnvClient[ActT, ObsT, StateT]:
        """The client itself."""
        return self._async

    def connect(self) -> Self:
        """As `EnvClient.connect`."""
        run(self._async.connect())
        return self

    def disconnect(self) -> None:
        """As `EnvClient.disconnect`."""
        run(self._async.disconnect())

    def reset(self, **kwargs: Any) -> StepResult[ObsT]:
        """As `EnvClient.reset`."""
        return run(self._async.reset(**kwargs))

    def step(self, action: ActT, **kwargs: Any) -> StepResult[ObsT]:
        """As `EnvClient.step`."""
        return run(self._async.step(action, **kwargs))

    def state(self) -> StateT:
        """As `EnvClient.state`."""
        return run(self._async.state())

    def close(self) -> None:
        """As `EnvClient.close`."""
        run(self._async.close())

    def __enter__(self) -> Self:
        try:
            return self.connect()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_async" not in self.__dict__:
            raise AttributeError(name)
        found = getattr(self._async, name)
        if not callable(found):
            return found

        @functools.wraps(found)
        def waited(*args: Any, **kwargs: Any) -> Any:
            answer = found(*args, **kwargs)
            return run(answer) if inspect.iscoroutine(answer) else answer

        return waited
