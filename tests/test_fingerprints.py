from __future__ import annotations

from pathlib import Path

from mftctl.fingerprints import file_digest


def test_a_folder_is_told_by_names_and_contents_of_its_files(tmp_path: Path) -> None:
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


def test_what_is_not_on_this_machine_has_no_digest() -> None:
    assert file_digest("openai/gsm8k") is None
