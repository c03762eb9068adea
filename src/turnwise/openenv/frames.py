"""Whole text frames of the WebSocket protocol (RFC 6455, 5.2), read and written without a parser.

Nearly every message of OpenEnv is one uncompressed text frame that arrives alone. Anything else is left to
the parser of `websockets`, which sees no frame that was read here.
"""

from __future__ import annotations

import os
from typing import Any

from websockets.protocol import Protocol

try:
    from websockets.speedups import apply_mask
except ImportError:  # Built without its C extension.
    from websockets.utils import apply_mask

TEXT = 0x81
"""First byte of a whole, uncompressed text frame."""
MASKED = 0x80
"""Set in the second byte of what clients send."""


def client_frame(text: bytes) -> bytes:
    """A text as a client sends it."""
    mask = os.urandom(4)
    return _head(len(text), MASKED) + mask + apply_mask(text, mask)


def server_frame(text: bytes) -> bytes:
    """A text as a server sends it."""
    return _head(len(text), 0) + text


def read_client_frame(data: bytes, most: int) -> bytes | None:
    """The text, where ``data`` is one whole frame of at most ``most`` bytes of it."""
    size = len(data)
    if size <= 6 or data[0] != TEXT:
        return None
    length, at = data[1] - MASKED, 6
    if length == 126:
        length, at = (data[2] << 8) | data[3], 8
    elif length == 127:
        length, at = int.from_bytes(data[2:10], "big"), 14
    return apply_mask(data[at:], data[at - 4 : at]) if at + length == size and length <= most else None


def read_server_frame(data: bytes, most: int) -> bytes | None:
    """The same of what servers send, unmasked."""
    size = len(data)
    if size <= 2 or data[0] != TEXT:
        return None
    length, at = data[1], 2
    if length == 126:
        length, at = (data[2] << 8) | data[3], 4
    elif length == 127:
        length, at = int.from_bytes(data[2:10], "big"), 10
    return data[at:] if at + length == size and length <= most else None


def between_messages(protocol: Protocol) -> bool:
    """Whether the parser waits for the first byte of a frame; of which message, it does not say."""
    waiting: Any = protocol.parser
    while waiting.gi_yieldfrom is not None:
        waiting = waiting.gi_yieldfrom
    return bool(waiting.__name__ == "at_eof")  # Anywhere else it is inside of a frame.


def _head(size: int, masked: int) -> bytes:
    if size < 126:
        return bytes((TEXT, masked | size))
    if size < 65536:
        return bytes((TEXT, masked | 126, size >> 8, size & 0xFF))
    return bytes((TEXT, masked | 127)) + size.to_bytes(8, "big")
