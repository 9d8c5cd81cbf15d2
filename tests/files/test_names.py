from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mftctl.errors import ConfigError, StorageError
from mftctl.files.names import is_recordable, require_recordable, require_short, shown_name

BAD = os.fsdecode(b"a-\xff")


@given(st.binary().filter(lambda name: b"\0" not in name))
def test_any_name_can_be_shown(name: bytes) -> None:
    text = os.fsdecode(name)
    assert is_recordable(shown_name(text))
    assert (shown_name(text) == text) == is_recordable(text)


def test_bytes_are_shown_escaped() -> None:
    assert shown_name(f"ü{BAD}\ud800") == r"üa-\xff\ud800"


@pytest.mark.parametrize("document", [BAD, {BAD: 1}, {"a": [1, {"b": (BAD,)}]}, "\ud800"])
def test_a_text_that_cannot_be_recorded(document: object) -> None:
    with pytest.raises(ConfigError, match="not valid UTF-8"):
        require_recordable([], document)


def test_a_link_to_a_folder_that_cannot_be_recorded(tmp_path: Path) -> None:
    (tmp_path / BAD).mkdir()
    (tmp_path / "link").symlink_to(BAD)
    require_recordable([tmp_path, None, "owner/name"])
    with pytest.raises(ConfigError, match="not valid UTF-8") as caught:
        require_recordable([tmp_path / "link" / "model"])
    assert str(caught.value.actual).endswith(r"a-\xff/model")


@pytest.mark.slow
@given(
    st.recursive(st.none() | st.integers() | st.text(), lambda part: st.lists(part) | st.dictionaries(st.text(), part))
)
def test_valid_json_and_utf_8_are_accepted(document: object) -> None:
    json.dumps(document, ensure_ascii=False).encode()
    require_recordable([], document)


def test_the_longest_names_are_those_of_the_file_system(tmp_path: Path) -> None:
    (tmp_path / ("ü" * 127)).mkdir()
    require_short(tmp_path / ("ü" * 127) / ("a" * 255))
    for path in (tmp_path / ("a" * 256), tmp_path / ("ü" * 128), tmp_path / ("a" * 256) / "model"):
        with pytest.raises(StorageError, match="name of the result is too long") as caught:
            require_short(path)
        assert caught.value.expected == "at most 255 bytes"
        assert caught.value.actual == "256"
        assert caught.value.hint == "a shorter --output"


def test_a_path_too_long_for_its_files(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["b" * 250] * 16)
    with pytest.raises(StorageError, match="name of the result is too long"):
        require_short(deep)
    require_short(tmp_path.joinpath(*["b" * 250] * 14))
