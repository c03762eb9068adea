"""What runs a server: OpenEnv's two kinds of provider, whoever wrote them."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class ContainerProvider(Protocol):
    """Runs an image."""

    def start_container(self, image: str, *args: Any, **kwargs: Any) -> str:
        """Start it; the server's URL. Takes ``port``, ``env_vars`` and its own."""
        ...

    def stop_container(self) -> None:
        """Stop and remove it."""
        ...

    def wait_for_ready(self, base_url: str, timeout_s: float = ...) -> None:
        """Block until the server answers."""
        ...


class Stoppable(Protocol):
    """Ends what was started elsewhere."""

    def stop(self) -> None:
        """End it."""
        ...


@runtime_checkable
class RuntimeProvider(Stoppable, Protocol):
    """Runs a process."""

    def start(self, *args: Any, **kwargs: Any) -> str:
        """Start it; the server's URL. Takes ``port``, ``env_vars``, ``workers``."""
        ...

    def wait_for_ready(self, timeout_s: float = ...) -> None:
        """Block until the server answers."""
        ...


Provider = ContainerProvider | Stoppable


def stop(provider: Provider) -> None:
    """Stop what a provider runs."""
    if isinstance(provider, ContainerProvider):
        provider.stop_container()
    else:
        provider.stop()
