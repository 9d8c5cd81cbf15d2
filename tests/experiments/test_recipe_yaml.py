from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mftctl.errors import ConfigError
from mftctl.experiments.recipe_yaml import MAX_BYTES, MAX_DEPTH, MAX_VALUES, parse_yaml, read_yaml


def refused(text: str) -> ConfigError:
    with pytest.raises(ConfigError, match="The text is too large") as caught:
        parse_yaml(text, "The text")
    assert "5,000 keys and values, 32 levels and 262,144 characters" in str(caught.value.expected)
    return caught.value


def laughs(levels: int) -> str:
    """A list of nine items, then lists of nine aliases of the previous one."""
    text = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    for level in range(1, levels):
        text += f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n"
    return text


@pytest.mark.parametrize("levels", [4, 5, 9, 90])
def test_exponential_aliases_are_counted_before_they_are_expanded(levels: int) -> None:
    assert refused(laughs(levels)).actual == f"more than {MAX_VALUES:,} keys and values, with aliases expanded"
    assert len(parse_yaml(laughs(3), "The text")["a2"]) == 9


def test_an_alias_of_a_long_text_is_counted_by_its_length() -> None:
    text = f"a: &a {'x' * 100_000}\nb: *a\nc: *a\n"
    assert refused(text).actual == f"more than {MAX_BYTES:,} characters, with aliases expanded"
    assert parse_yaml(text.replace("c: *a", "c: 1"), "The text")["b"] == "x" * 100_000


def test_merged_mappings_are_counted() -> None:
    text = "a: &a {b: 1, c: 2}\nd: {<<: [" + ", ".join(["*a"] * 1000) + "]}\n"
    assert "keys and values" in str(refused(text).actual)


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ("{a: ", "}"), ("- ", "")])
def test_depth_is_bounded(opening: str, closing: str) -> None:
    most = MAX_DEPTH - 1
    parse_yaml(opening * most + "1" + closing * most, "The text")
    for depth in (most + 1, 300):
        assert refused(opening * depth + "1" + closing * depth).actual == f"more than {MAX_DEPTH} levels"


def test_a_recursive_alias_is_refused() -> None:
    assert refused("a: &a [1, *a]\n").actual == "an alias inside its own anchor"


@pytest.mark.slow
@pytest.mark.parametrize("number", ["9" * 5000, "0x" + "f" * 200_000, "1." + "0" * 200])
def test_numbers_that_take_long_are_refused(number: str) -> None:
    assert refused(f"seed: {number}\n").actual == "a number with more than 100 digits"
    assert parse_yaml(f"'{number}'", "The text") == number


@pytest.mark.parametrize("value", ["!!int ''", "!!float ''", "!!bool x", "!!timestamp x", "!!int x", "2024-13-45"])
def test_tags_that_a_value_does_not_fit_are_config_errors(value: str) -> None:
    with pytest.raises(ConfigError, match="The text is not valid YAML"):
        parse_yaml(value, "The text")


def test_a_file_is_read_only_up_to_the_size_limit(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("# " + "x" * MAX_BYTES + "\nseed: 1\n")
    with pytest.raises(ConfigError, match="is too large") as caught:
        read_yaml(path)
    assert caught.value.path == str(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(Path("/dev/zero"))


TEXTS = st.text(max_size=20).filter(lambda text: text[:1] not in tuple("+-.0123456789"))
"""Not such as 0E0, which is text to PyYAML and a number to recipes."""

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=6,
)


@pytest.mark.slow
@given(value=VALUES)
def test_a_document_within_the_bounds_is_what_pyyaml_reads(value: object) -> None:
    text = yaml.safe_dump(value)
    assert parse_yaml(text, "The text") == yaml.safe_load(text)


@pytest.mark.parametrize("text", ["2:4", "16:32", "1:30.5", "1" + ":59" * 60_000])
def test_numbers_with_a_colon_are_text(text: str) -> None:
    """YAML 1.1 reads them in base 60."""
    assert parse_yaml(f"pattern: {text}", "A recipe") == {"pattern": text}
    assert parse_yaml(text, "A value") == text
