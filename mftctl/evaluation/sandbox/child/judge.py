"""The process that runs the test: names from the candidate are proxies, everything else is the judge's own."""

from __future__ import annotations

import builtins
import os
import sys
import types

from mftctl.evaluation.sandbox.child.codec import CodecError, Decoder, Encoder
from mftctl.evaluation.sandbox.child.frames import Frames, PeerGone

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from typing import Any

MODULE = "judgement"
DETAIL_CHARACTERS = 500
# A candidate that raises these could silently end a loop of the test early.
_FLOW = (StopIteration, StopAsyncIteration)


class Link:
    """Sends requests to the candidate and checks the form of every reply.

    Attributes:
        calls: Number of calls to the candidate's objects.
        broken: Why no further requests are possible; None while they are.
    """

    def __init__(self, frames: Frames) -> None:
        self._frames = frames
        self._encoder = Encoder(_number_of)
        self._decoder = Decoder(lambda number: Handle(self, number))
        self.calls = 0
        self.broken: str | None = None

    def request(self, kind: str, *arguments: Any) -> tuple[Any, ...]:
        """The candidate's reply; an exception that it raised is raised here.

        Raises:
            PeerGone: The candidate ended or sent an invalid reply.
            CodecError: An argument cannot be sent.
        """
        message = self._encoder.encode((kind, *arguments))
        try:
            self._frames.send(message)
            reply: object = self._decoder.decode(self._frames.receive())
        except PeerGone as error:
            self.broken = str(error)
            raise
        except CodecError as error:
            self.broken = f"the program sent an invalid reply: {error}"
            raise PeerGone(self.broken) from error
        match reply:
            case ("value", value, None | bytes() as changed):
                return ("value", value, changed)
            case ("end",):
                return ("end",)
            case ("raise", str(base), str(name), str(text)):
                raise _local_exception(base, name, text)
            case _:
                self.broken = "the program sent an invalid reply"
                raise PeerGone(self.broken)

    def value(self, kind: str, *arguments: Any) -> Any:
        """The value that a request returns."""
        reply = self.request(kind, *arguments)
        if reply[0] != "value":
            self.broken = "the program ended an iteration that was not started"
            raise PeerGone(self.broken)
        return reply[1]

    def call(self, target: Handle, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """The result of a call; changes to its arguments are applied here too."""
        self.calls += 1
        packed = self._encoder.encode((arguments, keywords))
        reply = self.request("call", target, packed)
        if reply[0] != "value":
            self.broken = "the program ended an iteration that was not started"
            raise PeerGone(self.broken)
        if reply[2] is not None:
            self._renew_arguments(reply[2], arguments, keywords)
        return reply[1]

    def _renew_arguments(self, packed: bytes, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        try:
            after = self._decoder.decode(packed)
        except CodecError as error:
            self.broken = f"the program sent an invalid reply: {error}"
            raise PeerGone(self.broken) from error
        match after:
            case (tuple(changed), dict(changed_keywords)) if len(changed) == len(arguments):
                _renew(arguments, changed)
                _renew(tuple(keywords.values()), tuple(changed_keywords.values()))
            case _:
                self.broken = "the program sent an invalid reply"
                raise PeerGone(self.broken)


class Handle:
    """A candidate's object that is not plain data: it can be called, iterated and passed back.

    It equals nothing, not even itself, and hides every special name, so that no library takes it for a number, an array
    or a container.
    """

    __slots__ = ("_sandbox_link", "_sandbox_number")

    _sandbox_link: Link
    _sandbox_number: int

    def __init__(self, link: Link, number: int) -> None:
        object.__setattr__(self, "_sandbox_link", link)
        object.__setattr__(self, "_sandbox_number", number)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Calls the candidate's object."""
        return self._sandbox_link.call(self, arguments, keywords)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._sandbox_link.value("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._sandbox_link.value("set", self, name, value)

    def __iter__(self) -> Any:
        iterator = self._sandbox_link.value("iterate", self)
        if not isinstance(iterator, Handle):
            raise TypeError("the program's object did not return an iterator")
        while (reply := self._sandbox_link.request("next", iterator))[0] == "value":
            yield reply[1]

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = object.__hash__


def _number_of(value: Any) -> int:
    if type(value) is not Handle:
        raise CodecError(f"the test passes a {type(value).__name__}, which cannot be sent to the program")
    return value._sandbox_number


def _local_exception(base: str, name: str, text: str) -> Exception:
    """The builtin exception that the candidate raised, or a RuntimeError that names it."""
    kind = getattr(builtins, base, None)
    text = text if name == base else f"{name}: {text}"
    plain = isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, _FLOW)
    if isinstance(kind, type) and plain and kind is not Exception:
        try:
            error: Exception = kind(text)
        except TypeError:  # for example UnicodeDecodeError, which cannot be built from a text
            return RuntimeError(f"{name}: {text}")
        return error
    return RuntimeError(text if name != base else f"{name}: {text}")


def _renew(before: Any, after: Any) -> bool:
    """Updates containers in place to their new value; returns whether that was possible."""
    if type(before) is not type(after):
        return False
    if isinstance(before, tuple):
        return len(before) == len(after) and all([_renew(*pair) for pair in zip(before, after, strict=True)])
    if isinstance(before, list):
        same = len(before) == len(after)
        before[:] = [
            old if same and _renew(old, new) else new for old, new in zip(before if same else after, after, strict=True)
        ]
        return True
    if isinstance(before, dict):
        kept = {key: before[key] if key in before and _renew(before[key], after[key]) else after[key] for key in after}
        before.clear()
        before.update(kept)
        return True
    if isinstance(before, set):
        before.clear()
        before.update(after)
        return True
    return False


def _names_in(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names_in(constant)
    return names


def _fill(namespace: dict[str, Any], test: str, code: types.CodeType, entry_point: str, link: Link) -> None:
    """Provides the test with the candidate's names, but never replaces the judge's own names.

    A standard-library module that a test uses without importing it is also the judge's own: a faked `math` could accept
    any result.
    """
    wanted = {name for name in _names_in(code) if not name.startswith("__")}
    wanted = {name for name in wanted if not hasattr(builtins, name) or name == entry_point}
    found = link.value("load", sorted(wanted))
    if not isinstance(found, dict) or not found.keys() <= wanted:
        link.broken = "the program sent an invalid reply"
        raise PeerGone(link.broken)
    for name, value in found.items():
        own = name in sys.stdlib_module_names and f"{name}." in test
        namespace[name] = __import__(name) if own else value


def judge(test: str, entry_point: str, link: Link) -> tuple[str, str]:
    """The outcome of a test and, unless it passed, why.

    Returns:
        One of `passed`, `failed`, `out of memory` and `crashed`, and the type and text of the failure.
    """
    module = types.ModuleType(MODULE)
    sys.modules[MODULE] = module
    try:
        code = compile(test, "<test>", "exec", dont_inherit=True)
        _fill(module.__dict__, test, code, entry_point, link)
        exec(code, module.__dict__)
    except PeerGone as error:
        return "crashed", str(error)
    except MemoryError as error:
        return "out of memory", _told(error)
    # A test may fail with any exception, including SystemExit.
    except BaseException as error:
        return ("failed", _told(error)) if link.broken is None else ("crashed", link.broken)
    if link.broken is not None:
        return "crashed", link.broken
    if link.calls == 0:
        return "failed", "the test never called the program"
    return "passed", ""


def _told(error: BaseException) -> str:
    text = str(error)
    name = type(error).__name__
    return f"{name}: {text}" if text else name


def serve(test: str, entry_point: str, read_fd: int, write_fd: int, report_fd: int) -> None:
    """Judges the candidate and reports the outcome; does not return."""
    outcome, detail = judge(test, entry_point, Link(Frames(read_fd, write_fd)))
    os.write(report_fd, f"{outcome}\n{detail[:DETAIL_CHARACTERS]}".encode("utf-8", "replace"))
    os._exit(0)
