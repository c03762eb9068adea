"""Sessions where the short way of frames is not offered: an older uvicorn, a server that is none of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.openenv.test_server_sessions import *  # noqa: F403 - the same tests

from turnwise.openenv.server import direct

# Of how many there may be and of HTTP, not of how frames come.
for _other in ("test_a_thousand_at_once_all_get_one", "test_a_server_that_stops_waits_for_no_slow_request"):
    del globals()[_other]


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    monkeypatch.setattr(direct, "NEEDED", ("what_no_uvicorn_has",))
    monkeypatch.setattr(direct.DirectWebSocket, "claim", None)
    yield
    # A message after the close is an error of the server, which nobody but its log is told.
    assert "Exception in ASGI application" not in capfd.readouterr().err
