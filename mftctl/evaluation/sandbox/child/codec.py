"""Serialises plain values between two processes, one of which must not trust the other.

Only plain data is ever built: no class is looked up, no code is called. Other objects are sent as handles, numbers that
are meaningful only to the process that owns the object.
"""

from __future__ import annotations

import struct
import sys

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Any

MAX_DEPTH = 150  # of nested containers; the recursion below stays well below Python's own limit
MAX_BYTES = 32 * 2**20  # of one encoded value

_I64 = struct.Struct("<q")
_F64 = struct.Struct("<d")
_U32 = struct.Struct("<I")
_MANY = 16  # numbers in a list from which they are packed: some tests return millions
_INT64 = range(-(2**63), 2**63)


class CodecError(Exception):
    """A value that cannot be sent, or bytes that are not a value."""


class Encoder:
    """Turns values into bytes.

    Attributes:
        to_handle: Returns the number of an object that is not plain data, or raises `CodecError`.
    """

    def __init__(self, to_handle: Callable[[Any], int]) -> None:
        self.to_handle = to_handle

    def encode(self, value: Any) -> bytes:
        """The encoded bytes of a value.

        Raises:
            CodecError: The value is nested too deeply, too large, or of a type that cannot be sent.
        """
        out = bytearray()
        self._put(value, out, 0)
        return bytes(out)

    def _put(self, value: Any, out: bytearray, depth: int) -> None:
        kind = type(value)
        if kind is int:
            _put_int(value, out)
        elif kind is str:
            _put_bytes(b"s", value.encode("utf-8", "surrogatepass"), out)
        elif kind is list:
            if len(value) < _MANY or not _put_numbers(b"l", value, out):
                self._put_items(b"[", value, len(value), out, depth)
        elif kind is float:
            out += b"f" + _F64.pack(value)
        elif kind is bool:
            out += b"T" if value else b"F"
        elif value is None:
            out += b"N"
        elif kind is tuple:
            if len(value) < _MANY or not _put_numbers(b"t", value, out):
                self._put_items(b"(", value, len(value), out, depth)
        else:
            self._put_rare(value, out, depth)

    def _put_rare(self, value: Any, out: bytearray, depth: int) -> None:
        """Rarer kinds, and subclasses, which are sent as the plain kind they derive from."""
        for base, convert in _PLAIN_BASES:
            if isinstance(value, base):
                self._put(convert(value), out, depth)
                return
        if isinstance(value, dict):
            flat = [part for item in dict.items(value) for part in item]
            self._put_items(b"{", flat, len(flat), out, depth)
        elif isinstance(value, set):
            self._put_items(b"<", set.__iter__(value), set.__len__(value), out, depth)
        elif isinstance(value, frozenset):
            self._put_items(b">", frozenset.__iter__(value), frozenset.__len__(value), out, depth)
        elif isinstance(value, complex):
            out += b"c" + _F64.pack(value.real) + _F64.pack(value.imag)
        elif isinstance(value, bytes):
            _put_bytes(b"b", bytes.__getitem__(value, slice(None)), out)
        elif any(value is kind for kind in _TYPES):
            _put_bytes(b"k", value.__name__.encode(), out)
        elif isinstance(value, range):
            self._put_items(b"r", (value.start, value.stop, value.step), 3, out, depth)
        else:
            self._put_object(value, out, depth)

    def _put_object(self, value: Any, out: bytearray, depth: int) -> None:
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(value, numpy.generic) and not isinstance(value.item(), numpy.generic):
            self._put(value.item(), out, depth)
        else:
            out += b"h" + _I64.pack(self.to_handle(value))

    def _put_items(self, tag: bytes, items: Iterable[Any], count: int, out: bytearray, depth: int) -> None:
        if depth >= MAX_DEPTH:
            raise CodecError(f"a value nested more than {MAX_DEPTH} levels deep cannot be sent")
        out += tag + _U32.pack(count)
        for item in items:
            self._put(item, out, depth + 1)
            if len(out) > MAX_BYTES:
                raise CodecError(f"a value of more than {MAX_BYTES} bytes cannot be sent")


_PLAIN_BASES: tuple[tuple[type[Any], Callable[[Any], Any]], ...] = (
    (int, int.__index__),
    (float, float.__float__),
    (str, lambda value: str.__getitem__(value, slice(None))),
    (list, lambda value: list.__getitem__(value, slice(None))),
    (tuple, lambda value: tuple(tuple.__iter__(value))),
)


def _put_int(value: int, out: bytearray) -> None:
    if value in _INT64:
        out += b"i" + _I64.pack(value)
    else:
        _put_bytes(b"I", value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True), out)


def _put_numbers(tag: bytes, values: Sequence[Any], out: bytearray) -> bool:
    """Packs integers and floats; False if the values include anything else."""
    if not set(map(type, values)) <= {int, float}:
        return False
    integers = [value for value in values if type(value) is int]
    floats = [value for value in values if type(value) is float]
    try:
        packed = struct.pack(f"<{len(integers)}q{len(floats)}d", *integers, *floats)
    except struct.error:  # an integer of more than 64 bits
        return False
    is_float = bytes([type(value) is float for value in values])
    _put_bytes(tag, is_float + packed, out)
    return True


def _put_bytes(tag: bytes, content: bytes, out: bytearray) -> None:
    if len(content) > MAX_BYTES:
        raise CodecError(f"a value of more than {MAX_BYTES} bytes cannot be sent")
    out += tag + _U32.pack(len(content)) + content


class Decoder:
    """Turns untrusted bytes into values.

    Attributes:
        from_handle: Returns the object for a handle's number.
    """

    def __init__(self, from_handle: Callable[[int], Any]) -> None:
        self.from_handle = from_handle
        self._data = b""
        self._at = 0

    def decode(self, data: bytes) -> Any:
        """The decoded value.

        Raises:
            CodecError: The bytes are not the encoding of one value.
        """
        self._data, self._at = data, 0
        value = self._value(0)
        if self._at != len(data):
            raise CodecError("bytes after the value")
        return value

    def _take(self, count: int) -> bytes:
        end = self._at + count
        if end > len(self._data):
            raise CodecError("a value is truncated")
        piece = self._data[self._at : end]
        self._at = end
        return piece

    def _value(self, depth: int) -> Any:
        tag = self._take(1)
        if tag == b"i":
            return _I64.unpack(self._take(8))[0]
        if tag == b"s":
            try:
                return self._sized().decode("utf-8", "surrogatepass")
            except UnicodeDecodeError as error:
                raise CodecError("a text is not UTF-8") from error
        if tag == b"f":
            return _F64.unpack(self._take(8))[0]
        if tag in _SINGLE:
            return _SINGLE[tag]
        if tag in _CONTAINERS:
            return self._container(tag, depth)
        return self._rare(tag)

    def _rare(self, tag: bytes) -> Any:
        if tag == b"I":
            return int.from_bytes(self._sized(), "little", signed=True)
        if tag == b"l":
            return self._numbers()
        if tag == b"t":
            return tuple(self._numbers())
        if tag == b"b":
            return self._sized()
        if tag == b"k":
            return self._type()
        if tag == b"c":
            return complex(_F64.unpack(self._take(8))[0], _F64.unpack(self._take(8))[0])
        if tag == b"h":
            return self.from_handle(_I64.unpack(self._take(8))[0])
        raise CodecError(f"unknown tag {tag!r}")

    def _numbers(self) -> list[Any]:
        packed = self._sized()
        count, rest = divmod(len(packed), 1 + _I64.size)
        is_float = packed[:count]
        if rest or is_float.count(0) + is_float.count(1) != count:
            raise CodecError("packed numbers are damaged")
        integers = is_float.count(0)
        values = struct.unpack_from(f"<{integers}q{count - integers}d", packed, count)
        if integers in (0, count):
            return list(values)
        sources = iter(values[:integers]), iter(values[integers:])
        return [next(sources[kind]) for kind in is_float]

    def _type(self) -> type[Any]:
        name = self._sized()
        for kind in _TYPES:
            if kind.__name__.encode() == name:
                return kind
        raise CodecError("an unknown type")

    def _sized(self) -> bytes:
        return self._take(_U32.unpack(self._take(4))[0])

    def _container(self, tag: bytes, depth: int) -> Any:
        if depth >= MAX_DEPTH:
            raise CodecError("a value is nested too deeply")
        count = _U32.unpack(self._take(4))[0]
        if count > len(self._data) - self._at:  # an item takes at least one byte
            raise CodecError("a value is truncated")
        items = [self._value(depth + 1) for _ in range(count)]
        if tag == b"[":
            return items
        if tag == b"(":
            return tuple(items)
        try:
            return _CONTAINERS[tag](items)
        except (TypeError, ValueError) as error:
            raise CodecError(f"a container holds an invalid item: {error}") from error


def _dict(flat: list[Any]) -> dict[Any, Any]:
    if len(flat) % 2:
        raise ValueError("a key without a value")
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _range(items: list[Any]) -> range:
    start, stop, step = items
    return range(start, stop, step)


_TYPES: tuple[type[Any], ...] = (int, float, str, bool, complex, bytes, list, tuple, dict, set, frozenset, range)
_SINGLE: dict[bytes, Any] = {b"N": None, b"T": True, b"F": False}
_CONTAINERS: dict[bytes, Callable[[list[Any]], Any]] = {
    b"[": list,
    b"(": tuple,
    b"{": _dict,
    b"<": set,
    b">": frozenset,
    b"r": _range,
}
