from __future__ import annotations

import json
from pathlib import Path

import pytest

from mftctl.errors import RunError
from mftctl.experiments.find_run import find_run

NAMES = ("001-fft", "005-mask-train", "006-eval", "006-probe", "012-eval", "1005-eval")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in NAMES:
        write(tmp_path / "runs" / name)
    return tmp_path / "runs"


def write(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(
        json.dumps({"command": folder.name[4:], "status": "finished", "started": "", "config": {}})
    )


@pytest.mark.parametrize("text", ["5", "005", "0005", "005-mask-train"])
def test_run_is_found_by_number_and_by_name(root: Path, text: str) -> None:
    assert find_run(root, text).name == "005-mask-train"


def test_number_is_not_the_end_of_another(root: Path) -> None:
    assert find_run(root, "1005").name == "1005-eval"


def test_run_is_found_by_its_folder_wherever_it_is(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "other" / "kept")
    assert find_run(root, str(tmp_path / "other" / "kept")).folder == tmp_path / "other" / "kept"
    monkeypatch.chdir(tmp_path)
    assert find_run(root, "other/kept/").name == "kept"
    assert find_run(tmp_path / "missing", "runs/001-fft").name == "001-fft"


def test_name_in_the_runs_folder_takes_precedence_over_a_folder_next_to_it(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "001-fft")
    monkeypatch.chdir(tmp_path)
    assert find_run(root, "001-fft").folder == root / "001-fft"


def test_number_of_several_runs_is_a_run_error_that_names_them(root: Path) -> None:
    with pytest.raises(RunError, match="Several runs have this number") as caught:
        find_run(root, "6")
    assert caught.value.expected == "one of 006-eval, 006-probe"
    assert find_run(root, "006-probe").name == "006-probe"


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("7", "006-eval or 006-probe or 005-mask-train"),
        ("2000", "1005-eval or 012-eval or 006-eval"),
        ("005-mask-tran", "005-mask-train"),
        ("runs/012-evl", "012-eval"),
        ("zzz", "012-eval or 1005-eval or 006-probe"),
    ],
)
def test_missing_run_is_a_run_error_with_the_nearest_names(root: Path, text: str, hint: str) -> None:
    with pytest.raises(RunError, match="There is no such run") as caught:
        find_run(root, text)
    assert (caught.value.path, caught.value.actual) == (str(root), text)
    assert hint.split(" or ")[0] in str(caught.value.hint) or text == "zzz"
    assert set(str(caught.value.hint).split(" or ")) <= set(NAMES)


def test_without_runs_the_hint_is_a_different_folder(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="There is no such run") as caught:
        find_run(tmp_path / "missing", "5")
    assert str(caught.value.hint).startswith("--runs DIR")


def test_folder_without_a_record_is_a_run_error(root: Path, tmp_path: Path) -> None:
    (root / "020-fft").mkdir()
    for text in ("20", str(tmp_path)):
        with pytest.raises(RunError, match="not a readable run folder"):
            find_run(root, text)
