from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from mftctl.experiments import fingerprints
from mftctl.experiments.fingerprints import file_digest


def test_a_folder_is_identified_by_names_and_contents_of_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "mmlu"
    (folder / "test").mkdir(parents=True)
    (folder / "test" / "a.csv").write_text("1")
    digests = [file_digest(str(folder))]
    (folder / "test" / "a.csv").write_text("2")
    digests.append(file_digest(str(folder)))
    (folder / "test" / "a.csv").rename(folder / "test" / "b.csv")
    digests.append(file_digest(str(folder)))
    assert len(set(digests)) == 3
    assert None not in digests
    assert file_digest(str(folder)) == digests[-1]


def test_paths_not_on_this_machine_have_no_digest() -> None:
    assert file_digest("openai/gsm8k") is None


def test_digest_of_the_source_is_that_of_all_python_files_in_the_order_of_their_names() -> None:
    package = Path(fingerprints.__file__).parents[1]
    files = {str(path.relative_to(package)): path.read_bytes() for path in package.rglob("*") if path.suffix == ".py"}
    assert "cli/app.py" in files
    told = b"".join(f"{name}:{len(files[name])}:".encode() + files[name] for name in sorted(files))
    assert fingerprints.source_digest() == hashlib.sha256(told).hexdigest()[:12]


@pytest.mark.slow
@pytest.mark.parametrize("change", ["another line", "another name", "another file"])
def test_any_change_of_the_source_changes_its_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    (tmp_path / "cli").mkdir()
    for name in ("runs.py", "cli/run.py"):
        (tmp_path / name).write_text("a = 1\n")
    monkeypatch.setattr(fingerprints, "__file__", str(tmp_path / "fingerprints.py"))
    before = fingerprints.source_digest.__wrapped__()
    (tmp_path / "data.json").write_text("{}")
    assert fingerprints.source_digest.__wrapped__() == before
    if change == "another line":
        (tmp_path / "cli/run.py").write_text("a = 2\n")
    elif change == "another name":
        (tmp_path / "cli/run.py").rename(tmp_path / "cli/ran.py")
    else:
        (tmp_path / "cli/__init__.py").write_text("")
    assert fingerprints.source_digest.__wrapped__() != before
