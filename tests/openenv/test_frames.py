"""Whole text frames read and written without a parser are those of `websockets`, and nothing else is read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.uri import parse_uri

from turnwise.openenv.frames import (
    between_messages,
    client_frame,
    read_client_frame,
    read_server_frame,
    server_frame,
)

MOST = 1 << 20
TEXTS = st.binary(min_size=1, max_size=300) | st.sampled_from(
    [b"x" * n for n in (1, 125, 126, 127, 65535, 65536, MOST)]
)


def parsed(data: bytes, *, mask: bool) -> Frame:
    """As `websockets` reads it."""
    left = memoryview(data)

    def read(count: int):  # type: ignore[no-untyped-def]
        nonlocal left
        yield from ()
        head, left = bytes(left[:count]), left[count:]
        return head

    parser = Frame.parse(read, mask=mask)
    with pytest.raises(StopIteration) as stopped:
        next(parser)
    assert not left
    frame = stopped.value.value
    assert isinstance(frame, Frame)
    return frame


@given(TEXTS)
def test_written_frames_are_frames_and_are_read_back(text: bytes) -> None:
    for written, mask, read in (
        (client_frame(text), True, read_client_frame),
        (server_frame(text), False, read_server_frame),
    ):
        frame = parsed(written, mask=mask)
        assert (frame.opcode, frame.fin, bytes(frame.data)) == (Opcode.TEXT, True, text)
        assert read(written, MOST) == text
        assert read(Frame(Opcode.TEXT, text).serialize(mask=mask), MOST) == text


@given(TEXTS, st.data())
def test_what_is_not_one_whole_text_frame_is_left_to_the_parser(text: bytes, data: st.DataObject) -> None:
    for mask, read in ((True, read_client_frame), (False, read_server_frame)):
        whole = Frame(Opcode.TEXT, text).serialize(mask=mask)
        cut = data.draw(st.integers(0, len(whole) - 1))
        assert read(whole[:cut], MOST) is None
        assert read(whole + b"\x81", MOST) is None
        assert read(whole, len(text) - 1) is None
        assert read(Frame(Opcode.TEXT, text, fin=False).serialize(mask=mask), MOST) is None
        assert read(Frame(Opcode.BINARY, text).serialize(mask=mask), MOST) is None
        if len(text) < 126:
            assert read(Frame(Opcode.PING, text).serialize(mask=mask), MOST) is None
        other = Frame(Opcode.TEXT, text).serialize(mask=not mask)
        assert read(other, MOST) is None or read is read_server_frame  # Its length cannot be a mask's.
        if read is read_server_frame:
            assert read(other, MOST) is None


def test_masks_differ_from_frame_to_frame() -> None:
    assert len({client_frame(b"the same") for _ in range(20)}) == 20


def test_inside_of_a_frame_is_not_between_messages() -> None:
    protocol = ClientProtocol(parse_uri("ws://127.0.0.1/ws"))
    protocol.state = protocol.state.OPEN
    protocol.parser = super(ClientProtocol, protocol).parse()
    next(protocol.parser)
    assert between_messages(protocol)
    frame = server_frame(b"x" * 300)
    for cut in (1, 3, 100):
        protocol.receive_data(frame[:cut])
        assert not between_messages(protocol)
        protocol.receive_data(frame[cut:])
        assert between_messages(protocol)
