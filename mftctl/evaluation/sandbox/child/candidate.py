"""The process that runs the model's code: it answers calls and has access to neither the tests nor any secret."""

from __future__ import annotations

import builtins
import os
import sys
import types

from mftctl.evaluation.sandbox.child.codec import CodecError, Decoder, Encoder
from mftctl.evaluation.sandbox.child.frames import Frames, PeerGone

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

MODULE = "solution"
_SCALARS = frozenset({int, float, str, bool, type(None), bytes, complex})


class ObjectTable:
    """The candidate's objects that the judge refers to by number."""

    def __init__(self) -> None:
        self._objects: list[Any] = []
        self._numbers: dict[int, int] = {}

    def number_of(self, value: Any) -> int:
        """The number of an object, always the same, because the table keeps the object alive."""
        number = self._numbers.setdefault(id(value), len(self._objects))
        if number == len(self._objects):
            self._objects.append(value)
        return number

    def object_of(self, number: int) -> Any:
        """The object with a number."""
        return self._objects[number]


class Candidate:
    """Answers the judge's requests for names that the model's code defines."""

    def __init__(self, frames: Frames) -> None:
        self._frames = frames
        self._table = ObjectTable()
        self._encoder = Encoder(self._table.number_of)
        self._decoder = Decoder(self._table.object_of)
        self._module = types.ModuleType(MODULE)
        # typing and dataclasses look up the module by name.
        sys.modules[MODULE] = self._module
        self._requests: dict[str, Callable[..., tuple[Any, ...]]] = {
            "load": self._load,
            "call": self._call,
            "get": lambda target, name: ("value", getattr(target, name), None),
            "set": self._set,
            "iterate": lambda target: ("value", iter(target), None),
            "next": self._next,
        }

    def serve(self, code: str) -> None:
        """Runs the code, then answers requests until the judge is gone."""
        failure = self._answer(lambda: self._run(code))
        while True:
            kind, *arguments = self._decoder.decode(self._frames.receive())
            reply = failure if failure[0] == "raise" else self._answer(self._requests[kind], *arguments)
            self._frames.send(self._encoded(reply))

    def _answer(self, work: Callable[..., tuple[Any, ...]], *arguments: Any) -> tuple[Any, ...]:
        try:
            return work(*arguments)
        except PeerGone:
            raise
        # Untrusted code may raise anything, including SystemExit; it is reported to the judge, which decides.
        except BaseException as error:
            return _raised(error)

    def _encoded(self, reply: tuple[Any, ...]) -> bytes:
        try:
            return self._encoder.encode(reply)
        # Untrusted subclasses run their own methods while they are encoded.
        except BaseException as error:
            return self._encoder.encode(_raised(error))

    def _run(self, code: str) -> tuple[Any, ...]:
        exec(compile(code, f"<{MODULE}>", "exec", dont_inherit=True), self._module.__dict__)
        return ("value", None, None)

    def _load(self, names: list[str]) -> tuple[Any, ...]:
        defined = self._module.__dict__
        return ("value", {name: defined[name] for name in names if name in defined}, None)

    def _call(self, target: Any, packed: bytes) -> tuple[Any, ...]:
        arguments, keywords = self._decoder.decode(packed)
        fixed = all(type(value) in _SCALARS for value in (*arguments, *keywords.values()))
        value = target(*arguments, **keywords)
        if fixed:
            return ("value", value, None)
        after = self._encoder.encode((arguments, keywords))
        return ("value", value, None if after == packed else after)

    def _set(self, target: Any, name: str, value: Any) -> tuple[Any, ...]:
        setattr(target, name, value)
        return ("value", None, None)

    def _next(self, target: Any) -> tuple[Any, ...]:
        try:
            return ("value", next(target), None)
        except StopIteration:
            return ("end",)


def _raised(error: BaseException) -> tuple[Any, ...]:
    """The closest builtin type and the text of an exception, as far as untrusted code lets them be read."""
    kind = next((base.__name__ for base in type(error).__mro__ if vars(builtins).get(base.__name__) is base), "")
    try:
        text = str(error)
    # Converting an untrusted exception to text runs untrusted code.
    except BaseException:
        text = ""
    return ("raise", kind, str(type(error).__name__)[:100], text[:500])


def serve(code: str, read_fd: int, write_fd: int) -> None:
    """Runs the model's code and answers the judge; does not return."""
    try:
        Candidate(Frames(read_fd, write_fd)).serve(code)
    except (PeerGone, CodecError):
        os._exit(0)
