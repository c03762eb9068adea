"""`EnvSocket` against servers that break the rules: replies reach their requests, or the line is closed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection, serve

from turnwise.errors import EnvHungError, EnvLostError, EnvSpecError
from turnwise.openenv.client.discovery import look
from turnwise.openenv.client.socket import EnvSocket, RefusedError, base_url, is_loopback, same_server
from turnwise.openenv.frames import between_messages, read_server_frame, server_frame

Answers = Callable[[ServerConnection], Awaitable[None]]


def frame(kind: str, data: Any = None) -> str:
    return json.dumps({"type": kind, "data": data})


@asynccontextmanager
async def connected(answers: Answers) -> AsyncIterator[EnvSocket]:
    async with serve(answers, "127.0.0.1", 0) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        socket = await EnvSocket.open(f"http://127.0.0.1:{port}", seconds=5)
        try:
            yield socket
        finally:
            await socket.close()


async def closed(socket: EnvSocket) -> None:
    deadline = asyncio.get_running_loop().time() + 10
    while socket.is_open:
        assert asyncio.get_running_loop().time() < deadline, "it stays open"
        await asyncio.sleep(0.005)


async def ask(socket: EnvSocket, number: int, seconds: float = 5.0) -> Any:
    reply = await socket.ask({"type": "step", "data": {"number": number}}, seconds=seconds)
    return reply["data"]


def test_late_replies_are_dropped() -> None:
    async def answers(connection: ServerConnection) -> None:
        held = []
        async for message in connection:
            asked = json.loads(message)
            if asked["type"] == "close":
                return
            held.append(asked["data"]["number"])
            if len(held) == 3:
                for number in held:
                    await connection.send(frame("observation", number))
                held.clear()

    async def main() -> None:
        async with connected(answers) as socket:
            for _ in range(5):
                with pytest.raises(EnvHungError, match=r"no answer to step within 0.05 s"):
                    await ask(socket, 1, 0.05)
                waiting = asyncio.ensure_future(ask(socket, 2))
                await asyncio.sleep(0.02)
                waiting.cancel()
                assert not socket.usable and socket.is_open
                assert await ask(socket, 3) == 3
                assert socket.usable

    asyncio.run(main())


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (frame("state", 1), "a step was answered with a frame of type 'state'"),
        (frame("mcp", {}), "a step was answered with a frame of type 'mcp'"),
        ("[1]", r"no JSON object: b'\[1\]'"),
        ("nonsense", "no JSON object: b'nonsense'"),
        (b"\xff\x00", "no JSON object"),
        ('{"data": 1}', "a step was answered with a frame of type None"),
    ],
)
def test_a_line_out_of_step_is_closed(sent: Any, why: str) -> None:
    async def answers(connection: ServerConnection) -> None:
        async for _ in connection:
            await connection.send(sent)

    async def main() -> None:
        async with connected(answers) as socket:
            with pytest.raises(EnvLostError, match=why):
                await ask(socket, 1)
            assert not socket.is_open
            with pytest.raises(EnvLostError, match=why):
                await ask(socket, 2)

    asyncio.run(main())


def test_two_replies_to_one_request() -> None:
    """The second is nobody's: after it no reply could be trusted to be the next request's."""

    async def answers(connection: ServerConnection) -> None:
        async for _ in connection:
            await connection.send(frame("observation", 1))
            await connection.send(frame("observation", 2))

    async def main() -> None:
        async with connected(answers) as socket:
            assert await ask(socket, 1) == 1
            await closed(socket)
            with pytest.raises(EnvLostError, match="a frame of type 'observation' that nobody asked for"):
                await ask(socket, 2)

    asyncio.run(main())


def test_pieces_make_one_reply() -> None:
    async def answers(connection: ServerConnection) -> None:
        async for _ in connection:
            text = frame("observation", "ä" * 1000)
            await connection.send(text[at : at + 100] for at in range(0, len(text), 100))

    async def main() -> None:
        async with connected(answers) as socket:
            for _ in range(3):
                assert await ask(socket, 1) == "ä" * 1000

    asyncio.run(main())


def test_pieces_of_a_frame_are_not_frames() -> None:
    """What follows the first byte of an Á reads as a head: 0x81, a length, and as many bytes as that."""
    inside = "A" + "x" * (ord("A") - 2) + '"}'
    text = '{"type":"observation","data":"Á' + inside
    whole = server_frame(text.encode())
    at = whole.index(b"\x81", 2)
    assert read_server_frame(whole[at:], 1000) is not None

    async def answers(connection: ServerConnection) -> None:
        async for message in connection:
            if json.loads(message)["type"] == "close":
                return
            connection.transport.write(whole[:at])
            await asyncio.sleep(0.02)
            connection.transport.write(whole[at:])

    async def main() -> None:
        async with connected(answers) as socket:
            for _ in range(5):
                assert await ask(socket, 1) == f"Á{inside[:-2]}"

    asyncio.run(main())


def test_whole_frames_pass_the_parser_by_and_others_in_between_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def answers(connection: ServerConnection) -> None:
        async for message in connection:
            if json.loads(message)["type"] == "close":
                return
            number = json.loads(message)["data"]["number"]
            reply = frame("observation", number)
            if number % 10 == 3:
                await connection.ping()
            await connection.send([reply[:5], reply[5:]] if number % 10 == 7 else reply)

    parsed = []

    def between(protocol: Any) -> bool:
        parsed.append(protocol)
        return between_messages(protocol)

    monkeypatch.setattr("turnwise.openenv.client.line.between_messages", between)

    async def main() -> None:
        async with connected(answers) as socket:
            assert [await ask(socket, number) for number in range(100)] == list(range(100))
            # The handshake; ten pings and ten replies in two or three pieces; nothing else.
            assert 10 <= len(parsed) <= 60

    asyncio.run(main())


def test_numbers_that_are_none() -> None:
    async def answers(connection: ServerConnection) -> None:
        async for _ in connection:
            await connection.send('{"type": "observation", "data": [NaN, Infinity, 123456789012345678901]}')

    async def main() -> None:
        async with connected(answers) as socket:
            assert await ask(socket, 1) == [None, None, 123456789012345678901]

    asyncio.run(main())


def test_what_orjson_cannot_write_is_sent_all_the_same() -> None:
    async def answers(connection: ServerConnection) -> None:
        async for message in connection:
            await connection.send(frame("observation", json.loads(message)["data"]))

    async def main() -> None:
        async with connected(answers) as socket:
            for value in (2**80, "\ud800", "ok"):
                reply = await socket.ask({"type": "step", "data": {"value": value}}, seconds=5)
                assert reply["data"]["value"] == value

    asyncio.run(main())


def test_a_message_that_is_told_before_the_end() -> None:
    async def answers(connection: ServerConnection) -> None:
        await connection.send(frame("error", {"code": "CAPACITY_REACHED", "message": "1 of 1 are in use"}))

    async def main() -> None:
        async with connected(answers) as socket:
            await closed(socket)
            with pytest.raises(EnvLostError, match="the server closed the session: 1 of 1 are in use"):
                await ask(socket, 1)
            assert socket.notice is not None

    asyncio.run(main())


def test_nobody_there() -> None:
    with pytest.raises(EnvLostError, match=r"http://127.0.0.1:9: no connection: .*"):
        asyncio.run(EnvSocket.open("http://127.0.0.1:9", seconds=1))


def test_a_server_that_takes_connections_and_says_nothing() -> None:
    async def main() -> None:
        async with await asyncio.start_server(lambda *_: asyncio.sleep(30), "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(EnvLostError, match=r"no connection: timed out"):
                await EnvSocket.open(f"http://127.0.0.1:{port}", seconds=0.2)

    asyncio.run(main())


def test_a_connection_that_is_taken_and_closed_may_be_tried_again() -> None:
    """As a proxy does whose server is still being started."""

    async def main() -> None:
        async def closing(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.close()

        async with await asyncio.start_server(closing, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(EnvLostError, match=r"closed before it was answered|no connection") as lost:
                await EnvSocket.open(f"http://127.0.0.1:{port}", seconds=1)
            assert not isinstance(lost.value, RefusedError)

    asyncio.run(main())


def test_a_web_server_of_another_kind() -> None:
    async def main() -> None:
        async def web(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            writer.close()

        async with await asyncio.start_server(web, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(RefusedError, match="HTTP 404 at /ws: no OpenEnv server"):
                await EnvSocket.open(f"http://127.0.0.1:{port}", seconds=30)

    asyncio.run(main())


@pytest.mark.parametrize("path", ["/ws", "/metadata"])
def test_headers_go_to_no_other_server(path: str) -> None:
    """Neither where a WebSocket is led elsewhere, nor where what it serves is asked for."""
    stolen: list[bytes] = []

    async def main() -> None:
        async def thief(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            stolen.append(await reader.readuntil(b"\r\n\r\n"))
            writer.close()

        async def leading(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            to = f"Location: {'ws' if path == '/ws' else 'http'}://me:s3cret@127.0.0.1:{port_of(away)}{path}\r\n"
            writer.write(f"HTTP/1.1 307 Temporary Redirect\r\n{to}Content-Length: 0\r\n\r\n".encode())
            writer.close()

        async with (
            await asyncio.start_server(thief, "127.0.0.1", 0) as away,
            await asyncio.start_server(leading, "127.0.0.1", 0) as server,
        ):
            url, headers = f"http://127.0.0.1:{port_of(server)}", {"X-Key": "s3cret"}
            if path == "/ws":
                with pytest.raises(RefusedError, match="HTTP 307 at /ws: it leads to another server"):
                    await EnvSocket.open(url, seconds=30, headers=headers)
            else:
                with pytest.raises(EnvSpecError, match=r"leads to http://127.0.0.1:\d+/metadata; if that is"):
                    await look(url, headers)

    asyncio.run(main())
    assert stolen == []


def test_an_address_is_settled_where_its_redirects_lead() -> None:
    async def main() -> None:
        async def leading(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            path = (await reader.readuntil(b"\r\n\r\n")).split()[1].decode()
            body = b'{"name": "it", "properties": {}}'
            head = "200 OK" if path.startswith("/env/") else f"308 Permanent Redirect\r\nLocation: /env{path}"
            end = f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            writer.write(f"HTTP/1.1 {head}\r\n{end}".encode() + body)
            writer.close()

        async with await asyncio.start_server(leading, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{port_of(server)}"
            about = await look(url, {})
            assert (about.url, about.name) == (f"{url}/env", "it")

    asyncio.run(main())


def port_of(server: asyncio.Server) -> int:
    port: int = server.sockets[0].getsockname()[1]
    return port


@pytest.mark.parametrize(
    ("url", "to", "same"),
    [
        ("http://a", "https://a/ws", True),
        ("ws://a:80/x", "wss://a:443/y", True),
        ("http://a:8000/x", "http://a:8000/y", True),
        ("https://a", "http://a", False),
        ("http://a:8000", "https://a", False),
        ("http://a:8000", "http://a:8001", False),
        ("https://a", "https://b", False),
    ],
)
def test_which_redirects_stay_where_they_were(url: str, to: str, same: bool) -> None:
    assert same_server(url, to) is same


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_fails_may_be_asked_again(status: int) -> None:
    async def main() -> None:
        async def failing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(f"HTTP/1.1 {status} Busy\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
            writer.close()

        async with await asyncio.start_server(failing, "127.0.0.1", 0) as server:
            with pytest.raises(EnvLostError, match=f"/metadata: HTTP {status}"):
                await look(f"http://127.0.0.1:{port_of(server)}", {})

    asyncio.run(main())


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("http://a:8000/", "http://a:8000"),
        ("ws://a:8000/ws", "http://a:8000"),
        ("wss://a/env/ws", "https://a/env"),
        ("https://a/web/", "https://a"),
        ("https://huggingface.co/spaces/Org/My_Env.2", "https://org-my-env-2.hf.space"),
    ],
)
def test_addresses(written: str, meant: str) -> None:
    assert base_url(written) == meant


@pytest.mark.parametrize("written", ["a:8000", "ftp://a", "http://", ""])
def test_no_addresses(written: str) -> None:
    with pytest.raises(EnvSpecError, match="is no address of a server; write http://host:port"):
        base_url(written)


def test_loopback() -> None:
    assert all(map(is_loopback, ("http://localhost:1", "http://127.0.0.2", "http://[::1]:8")))
    assert not any(map(is_loopback, ("http://10.0.0.1", "http://localhost.example")))
