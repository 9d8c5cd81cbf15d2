"""Length-prefixed messages over a pair of pipes."""

from __future__ import annotations

import os
import struct

from mftctl.evaluation.sandbox.child.codec import MAX_BYTES

MAX_FRAME_BYTES = 3 * MAX_BYTES  # a message contains a value, and the arguments after the call
_LENGTH = struct.Struct("<I")


class PeerGone(BaseException):
    """The other process ended or violated the protocol; tests must not catch this as an ordinary error."""


class Frames:
    """Messages to and from the other process."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._stream = open(read_fd, "rb")
        self._write_fd = write_fd

    def send(self, message: bytes) -> None:
        """Writes one message.

        Raises:
            PeerGone: The other process no longer reads.
        """
        view = memoryview(_LENGTH.pack(len(message)) + message)
        try:
            while view:
                view = view[os.write(self._write_fd, view) :]
        except OSError as error:
            raise PeerGone(f"the other process no longer reads: {error.strerror}") from error

    def receive(self) -> bytes:
        """The next message.

        Raises:
            PeerGone: The other process ended, or announced a message that is too long.
        """
        head = self._stream.read(_LENGTH.size)
        if len(head) < _LENGTH.size:
            raise PeerGone("the other process ended")
        length = _LENGTH.unpack(head)[0]
        if length > MAX_FRAME_BYTES:
            raise PeerGone(f"the other process announced a message of {length} bytes")
        body = self._stream.read(length)
        if len(body) < length:
            raise PeerGone("the other process ended within a message")
        return body
