"""Lines of plain and compressed files, and one named test per way such a file can be wrong."""

from __future__ import annotations

import gzip
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mftctl.data.text_lines import not_utf8, text_lines
from mftctl.errors import DataError


def lines(path: Path, content: bytes, newline: str = "\n") -> list[str]:
    path.write_bytes(content)
    return list(text_lines(path, newline=newline))


def zstd(content: bytes) -> bytes:
    return bytes(pyarrow.Codec("zstd").compress(content, asbytes=True))


@given(st.text(st.characters(codec="utf-8")), st.sampled_from(["a.txt", "a.txt.gz", "a.TXT.ZST"]), st.booleans())
def test_lines_are_those_of_the_text(
    tmp_path_factory: pytest.TempPathFactory, text: str, name: str, mark: bool
) -> None:
    text = text.removeprefix("\ufeff")
    content = b"\xef\xbb\xbf" * mark + text.encode()
    packed = {".gz": gzip.compress, ".zst": zstd}.get(Path(name).suffix.lower(), bytes)(content)
    found = lines(tmp_path_factory.getbasetemp() / name, packed)
    assert "".join(found) == text
    assert [line.removesuffix("\n") for line in found] == text.removesuffix("\n").split("\n")[: len(found)]
    assert len(found) == text.count("\n") + bool(text and not text.endswith("\n"))


def test_only_the_first_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    assert lines(tmp_path / "a", b"\xef\xbb\xbf\xef\xbb\xbfa\n\xef\xbb\xbfb") == ["\ufeffa\n", "\ufeffb"]


def test_lone_carriage_returns_end_lines_only_if_asked_for(tmp_path: Path) -> None:
    content = b"a\rb\r\nc\n"
    assert lines(tmp_path / "a", content) == ["a\rb\r\n", "c\n"]
    assert lines(tmp_path / "a", content, newline="") == ["a\r", "b\r\n", "c\n"]


@pytest.mark.parametrize("name", ["a.gz", "a.zst"])
def test_several_compressed_parts_are_one_text(tmp_path: Path, name: str) -> None:
    pack = gzip.compress if name == "a.gz" else zstd
    assert lines(tmp_path / name, pack(b"a\nb") + pack(b"c\nd")) == ["a\n", "bc\n", "d"]


@pytest.mark.parametrize(
    ("content", "byte"),
    [
        (b"ab\xe9c\n", "0xe9"),
        (b"\xe2\x82", "0xe2"),
        (b"\xc3\xa9\xff", "0xff"),
        (b"\xef\xbb", "0xef"),
        (b"\xed\xa0\x80", "0xed"),
    ],
)
def test_byte_that_is_not_utf8(tmp_path: Path, content: bytes, byte: str) -> None:
    path = tmp_path / "a"
    good, bad = lines(path, "é😀\ue000\n".encode() + content)
    assert not_utf8(good, path, 1) is None
    error = not_utf8(bad, path, 2)
    assert error is not None
    assert (error.path, error.actual) == (f"{path}:2", f"the byte {byte}")


@pytest.mark.parametrize(
    "cut", [lambda packed: packed[:-5], lambda packed: b"hello" + packed, lambda packed: packed + b"junk"]
)
@pytest.mark.parametrize(("name", "pack"), [("a.gz", gzip.compress), ("a.zst", zstd)])
def test_damaged_compressed_file(tmp_path: Path, name: str, pack: object, cut: object) -> None:
    with pytest.raises(DataError, match=f"not a complete {'gzip' if name == 'a.gz' else 'zstd'} file") as caught:
        lines(tmp_path / name, cut(pack(b"some text\n" * 99)))
    assert caught.value.path == str(tmp_path / name)


@pytest.mark.parametrize("name", ["a", "a.gz", "a.zst"])
def test_absent_file_is_an_error_of_the_system(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError):
        next(text_lines(tmp_path / name, newline="\n"))
