"""The short way of frames: the same messages as by uvicorn's own, however their bytes arrive."""

from __future__ import annotations

import json
import random
import socket
import struct
import threading
import time

import pytest
from starlette.websockets import WebSocket
from tests.openenv.serving import Serving, as_app, running

from turnwise.envs.base import Env
from turnwise.types import Step


class Parrot(Env):
    """Says back what was said."""

    inline = True

    def reset(self, task: object) -> str:
        return "go"

    def step(self, reply: str) -> Step:
        return Step(reply)


def frame(payload: bytes, *, opcode: int = 1, fin: bool = True, mask: bytes = b"\x81\x85\x00\xff") -> bytes:
    size = len(payload)
    head = bytes((opcode | (0x80 if fin else 0),))
    if size < 126:
        head += bytes((0x80 | size,))
    elif size < 65536:
        head += struct.pack("!BH", 0x80 | 126, size)
    else:
        head += struct.pack("!BQ", 0x80 | 127, size)
    return head + mask + bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload))


def say(text: str) -> bytes:
    return json.dumps({"type": "step", "data": {"text": text}}).encode()


class Raw:
    """A client that writes bytes as it is told."""

    def __init__(self, server: Serving) -> None:
        host, port = server.url[7:].split(":")
        self.socket = socket.create_connection((host, int(port)), timeout=10)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.sendall(
            f"GET /ws HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Extensions: permessage-deflate\r\n\r\n".encode()
        )
        self.file = self.socket.makefile("rb")
        assert b"101" in self.file.readline()
        while self.file.readline() != b"\r\n":
            pass

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def frame(self) -> tuple[int, bytes]:
        first, size = self.file.read(2)
        if size == 126:
            (size,) = struct.unpack("!H", self.file.read(2))
        elif size == 127:
            (size,) = struct.unpack("!Q", self.file.read(8))
        return first & 15, self.file.read(size)

    def heard(self) -> str:
        opcode, payload = self.frame()
        assert opcode == 1, (opcode, payload)
        return str(json.loads(payload)["data"]["observation"]["text"])


@pytest.fixture(scope="module")
def server():
    with running(as_app(Parrot)) as server:
        yield server


@pytest.fixture
def raw(server: Serving):
    raw = Raw(server)
    raw.send(frame(b'{"type": "reset"}'))
    assert raw.heard() == "go"
    yield raw
    raw.socket.close()


@pytest.mark.parametrize("size", [0, 1, 60, 90, 91, 92, 1000, 65_000, 65_500, 65_536, 300_000])
def test_frames_of_every_length(raw: Raw, size: int) -> None:
    for _ in range(3):
        raw.send(frame(say("x" * size)))
        assert raw.heard()[:65_536] == "x" * min(size, 65_536)


def test_a_frame_may_arrive_byte_by_byte(raw: Raw) -> None:
    for byte in frame(say("slowly")) + frame(say("again")):
        raw.send(bytes((byte,)))
    assert [raw.heard(), raw.heard()] == ["slowly", "again"]
    raw.send(frame(say("whole")))
    assert raw.heard() == "whole"


def test_frames_may_arrive_together_and_cut_anywhere(raw: Raw) -> None:
    chance = random.Random(3)
    said = [str(number) * chance.choice((1, 30, 200)) for number in range(200)]
    stream = b"".join(frame(say(text), mask=chance.randbytes(4)) for text in said)

    def write() -> None:
        at = 0
        while at < len(stream):
            size = chance.choice((1, 2, 5, 100, 137, 1000))
            raw.send(stream[at : at + size])
            at += size

    writer = threading.Thread(target=write)
    writer.start()
    assert [raw.heard() for _ in said] == said
    writer.join()


def test_what_looks_like_a_frame_inside_of_one_is_none(raw: Raw) -> None:
    """After the two bytes of a head, the mask and what follows read as a frame of their own."""
    text = say("outer")
    mask = bytes((0x81, 0x80 | (4 + len(text) - 6), 7, 7))
    for cut in range(1, 14):
        whole = frame(text, mask=mask)
        raw.send(whole[:cut])
        time.sleep(0.02)
        raw.send(whole[cut:])
        assert raw.heard() == "outer"


def test_fragments_pings_and_closes_between(raw: Raw) -> None:
    text = say("in three parts")
    raw.send(frame(text[:5], fin=False))
    raw.send(frame(b"are you there", opcode=9))
    assert raw.frame() == (10, b"are you there")
    raw.send(frame(text[5:9], opcode=0, fin=False))
    raw.send(frame(text[9:], opcode=0))
    assert raw.heard() == "in three parts"
    raw.send(frame(b"", opcode=9) + frame(say("together")))
    assert raw.frame() == (10, b"")
    assert raw.heard() == "together"
    raw.send(frame(say("last")) + frame(struct.pack("!H", 1000), opcode=8))
    opcode, _ = raw.frame()
    assert opcode in (1, 8)


def test_a_text_frame_between_fragments_is_the_clients_error(raw: Raw) -> None:
    raw.send(frame(b'{"type"', fin=False))
    raw.send(frame(say("no")))
    assert raw.frame()[0] == 8


def test_an_unmasked_frame_is_the_clients_error(raw: Raw) -> None:
    text = say("bare")
    raw.send(bytes((0x81, len(text))) + text)
    assert raw.frame()[0] == 8


def test_text_that_is_no_text_is_answered(raw: Raw) -> None:
    raw.send(frame(b"\xff\xfe\x00 not text"))
    opcode, payload = raw.frame()
    assert opcode == 1 and json.loads(payload)["data"]["code"] == "INVALID_JSON"
    raw.send(frame(say("on")))
    assert raw.heard() == "on"


def test_other_sockets_of_the_same_app_see_plain_asgi() -> None:
    app = as_app(Parrot)

    @app.websocket("/own")
    async def own(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text((await socket.receive_text()).upper())
        await socket.close()

    from websockets.sync.client import connect

    with running(app) as server, connect(f"ws{server.url[4:]}/own") as ws:
        ws.send("loud")
        assert ws.recv() == "LOUD"
