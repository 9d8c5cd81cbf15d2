from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mftctl.errors import OutputError
from mftctl.progress import Silence
from mftctl.reporting.output.markdown import to_markdown
from mftctl.reporting.output.write import require_report_folder, to_document, write_report
from mftctl.reporting.report import Report, make_report
from tests.reporting.training_folders import write_study


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    root = tmp_path_factory.mktemp("study") / "runs"
    write_study(root)
    return make_report(root, Silence())


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_report_is_a_page_a_text_a_document_tables_and_figures(report: Report, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "report"
    for _ in range(2):
        files = write_report(report, folder, Silence())
    names = [file.relative_to(folder).as_posix() for file in files]
    assert names[:3] == ["index.html", "report.md", "report.json"]
    assert files_in(folder) == {*names, "mftctl.json"}
    assert {Path(name).parts[0] for name in names[3:]} == {"tables", "figures"}
    assert (folder / "report.md").read_text("utf-8") == to_markdown(report)
    document = json.loads((folder / "report.json").read_text("utf-8"))
    assert document.pop("files") == names
    assert document == json.loads(json.dumps(to_document(report)))


def test_the_document_has_every_number_with_its_runs(report: Report) -> None:
    document = json.loads(json.dumps(to_document(report)))
    row = document["tables"][0]["rows"][-1]
    assert row["state"] == "MFT"
    assert "made" not in row
    assert row["runs"] == ["009-eval", "019-eval"]
    assert [single["run"] for single in row["by_seed"]] == row["runs"]
    assert set(row["change"]) == {"value", "low", "high", "verdict", "p_value", "corrected_p_value"}
    sources = {source["name"]: source for source in document["sources"]}
    named = [*document["tables"], *document["overviews"]]
    assert named
    used = {name for table in document["tables"] for row in table["rows"] for name in row["runs"]}
    used |= {name for item in (*document["efficiency"], *document["figures"]) for name in item["runs"]}
    assert used <= sources.keys()
    assert all(source["reproduction"].startswith("mftctl ") for source in sources.values())
    assert all(figure["data"] for figure in document["figures"])


@pytest.mark.slow
def test_files_of_an_earlier_report_are_removed_and_others_stay(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path, Silence())
    old = [path for path in (tmp_path / "figures").iterdir() if path.suffix == ".png"]
    own = [tmp_path / "figures" / "own.svg", tmp_path / "mine.txt"]
    for path in own:
        path.write_text("x", encoding="utf-8")
    write_report(replace(report, figures=()), tmp_path, Silence())
    assert old
    assert not any(path.exists() for path in old)
    assert all(path.exists() for path in own)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["index.html", "report.md", "report.json", "tables"])
def test_a_user_file_is_not_overwritten(report: Report, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match="would be replaced"):
        write_report(report, tmp_path, Silence())
    assert files_in(tmp_path) == {name}


@pytest.mark.slow
def test_files_listed_by_a_user_document_stay(report: Report, tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "mine.png").write_text("mine", encoding="utf-8")
    (tmp_path / "report.json").write_text('{"files": ["figures/mine.png"]}', encoding="utf-8")
    with pytest.raises(OutputError, match="would be replaced"):
        write_report(report, tmp_path, Silence())
    assert files_in(tmp_path) == {"figures/mine.png", "report.json"}


@pytest.mark.parametrize("name", ["report.md", "figures", "tables", "answers"])
def test_a_file_in_the_way_is_found_before_any_work(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match="would be replaced"):
        require_report_folder(tmp_path)


def test_a_report_needs_a_folder(tmp_path: Path) -> None:
    (tmp_path / "report").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match="needs a folder, but this path is a file"):
        require_report_folder(tmp_path / "report")
