"""`address`: where a server is, and what every request to it brings, of what a person wrote."""

from __future__ import annotations

from base64 import b64encode
from urllib.parse import unquote, urlsplit

from turnwise.envs.registry import unsigned
from turnwise.errors import EnvSpecError
from turnwise.openenv.client.socket import base_url


def address(url: str, token: str | None = None) -> tuple[str, dict[str, str]]:
    """A server's address as `base_url` has it, and the headers of its requests.

    Args:
        url: Without a scheme it is ``http://``. A user and password in it, as proxies ask for, are sent as
            HTTP's basic authentication and stand in no error and no log.
        token: Sent as ``Authorization: Bearer``.

    Raises:
        EnvSpecError: It is no address, or there is a password in it and a token too.
    """
    whole = url if "://" in url else f"http://{url}"
    base = base_url(unsigned(whole))
    signed, at, _ = urlsplit(whole).netloc.rpartition("@")
    if not at:
        return base, bearer(token)
    if token is not None:
        raise EnvSpecError(f"{base}: a user in the address and a token cannot both be sent; leave one away")
    user, _, password = signed.partition(":")
    pair = b64encode(f"{unquote(user)}:{unquote(password)}".encode()).decode()
    return base, {"Authorization": f"Basic {pair}"}


def bearer(token: str | None) -> dict[str, str]:
    """The header that carries a token; {} without one."""
    return {} if token is None else {"Authorization": f"Bearer {token}"}
