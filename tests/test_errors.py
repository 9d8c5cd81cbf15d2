from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from mftctl import errors
from mftctl.errors import (
    ConfigError,
    Interrupted,
    MaskFileError,
    MaskFormatError,
    MaskMismatchError,
    MftError,
    OutputError,
)

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, MftError)]
FIELDS = {
    "path": "train.jsonl:3",
    "key": "fft.epochs",
    "expected": "a number",
    "actual": "'three'",
    "hint": "--epochs 3",
}


def test_message_alone_is_one_line() -> None:
    assert str(MftError("The file is empty.")) == "The file is empty."


def test_message_says_what_where_expected_got_and_what_to_do() -> None:
    assert str(MftError("The recipe does not fit.", **FIELDS)) == (
        "The recipe does not fit.\n"
        "  where: train.jsonl:3\n"
        "  key: fft.epochs\n"
        "  expected: a number\n"
        "  got: 'three'\n"
        "  try: --epochs 3"
    )


def test_zero_and_empty_values_are_shown() -> None:
    assert str(MftError("Too few.", expected=1, actual=0)) == "Too few.\n  expected: 1\n  got: 0"


def test_path_is_kept_as_text() -> None:
    assert MftError("Gone.", path=Path("runs") / "001-fft").path == "runs/001-fft"
    assert MftError("Gone.").path is None


def test_config_error_lists_every_problem() -> None:
    error = ConfigError("It does not fit.", problems=["seed: no number", "fft.epochs: unknown key"], path="r.yaml")
    assert str(error).splitlines() == [
        "It does not fit.",
        "  where: r.yaml",
        "  - seed: no number",
        "  - fft.epochs: unknown key",
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_exit_code_is_2_for_configuration_130_for_interruption_and_1_for_all_else(kind: type[MftError]) -> None:
    assert kind.exit_code == {ConfigError: 2, OutputError: 2, Interrupted: 130}.get(kind, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_error_survives_transfer_to_another_process(kind: type[MftError]) -> None:
    error = kind("It does not fit.", **FIELDS)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error)
    assert copy.args == error.args
    assert vars(copy) == vars(error)


def test_problems_survive_transfer_to_another_process() -> None:
    copy = pickle.loads(pickle.dumps(ConfigError("No.", problems=["a", "b"])))
    assert copy.problems == ("a", "b")


def test_tree_in_the_docstring_is_the_tree_in_the_code() -> None:
    tree = {line.lstrip("│├└─ ").split()[0] for line in (errors.__doc__ or "").splitlines() if "──" in line}
    assert tree | {"MftError"} == {kind.__name__ for kind in KINDS}
    assert issubclass(MaskFormatError, MaskFileError)
    assert issubclass(MaskMismatchError, MaskFileError)
    assert not issubclass(ConfigError, MaskFileError)
