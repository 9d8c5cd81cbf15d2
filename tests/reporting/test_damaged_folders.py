"""A damaged run folder is reported in one line and hides no other run, whichever part is damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mftctl.errors import EvaluationError
from mftctl.experiments.run_folder import list_runs
from mftctl.files.json_files import json_text
from mftctl.progress import Silence
from mftctl.reporting.figures.style import Drawing
from mftctl.reporting.output.markdown import to_markdown
from mftctl.reporting.output.page import to_page
from mftctl.reporting.output.table_files import table_files
from mftctl.reporting.output.write import to_document
from mftctl.reporting.paired_change import Samples, paired_change
from mftctl.reporting.report import Report, make_report
from mftctl.reporting.two_runs import compare_two
from mftctl.reporting.watch import follow
from tests.reporting.every_kind import write_every_kind

Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound") / "runs"
    write_every_kind(root)
    return root


def record(*path: str | int, value: Any) -> Damage:
    """Replaces a value in the record."""

    def damage(folder: Path) -> None:
        document = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        place = document
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        (folder / "run.json").write_text(json.dumps(document), encoding="utf-8")

    return damage


def lines(file: str, change: Callable[[dict[str, Any]], object]) -> Damage:
    """Changes every line of a file."""

    def damage(folder: Path) -> None:
        rows = [json.loads(line) for line in (folder / file).read_text(encoding="utf-8").split("\n")[:-1]]
        for row in rows:
            change(row)
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    return damage


def content(file: str, text: bytes) -> Damage:
    """Replaces the content of a file."""

    def damage(folder: Path) -> None:
        (folder / file).write_bytes(text)

    return damage


DAMAGES: list[tuple[str, Damage]] = [
    ("001-fft", content("metrics.jsonl", b"[" * 100_000 + b"\n")),
    ("001-fft", content("metrics.jsonl", b'{"step": 1, "eval_loss": 1e400, "epoch": "x"}\n')),
    ("001-fft", content("metrics.jsonl", b"\xff\xfe\n")),
    ("001-fft", record("config", "fft", value={"batch_size": "many"})),
    ("001-fft", record("result", "tokens", value="many")),
    ("001-fft", record("config", "seed", value=[0])),
    ("003-mask-train", record("config", "mask_train", value=None)),
    ("003-mask-train", record("inputs", value={"parents": None})),
    ("006-eval", content("samples.jsonl", b'{"id": 1, "scores": {"loss": 1}}\n')),
    ("006-eval", lines("samples.jsonl", lambda row: row["scores"].update(loss=float("nan")))),
    ("006-eval", lines("samples.jsonl", lambda row: row["weights"].update(loss=0))),
    ("006-eval", record("result", "datasets", 0, "metrics", 0, "value", value=float("nan"))),
    ("006-eval", record("result", "datasets", 0, "samples", value="a\0b")),
    ("008-eval", record("inputs", value={"state": "MFT", "origin": "models/base", "parents": ["003-mask-train"]})),
    ("010-probe", record("result", "groups", 0, "change", value=float("inf"))),
    ("010-probe", record("result", "groups", 0, "layers", value="9" * 5000)),
    ("011-probe", record("result", "agreement", value={"run": "010-probe"})),
    ("012-mask-train", record("inputs", "model", value="x" * 5000)),
    ("012-mask-train", content("mask.bits", b"")),
    ("014-surface", record("inputs", "corners", value=[])),
    ("014-surface", lines("metrics.jsonl", lambda row: row.update(y=row["x"]))),
    ("014-surface", lines("metrics.jsonl", lambda row: row.update(x="0"))),
    ("030-apply", record("inputs", value={"parents": [], "origin": "o"})),
]


def outputs_of(report: Report) -> None:
    """All outputs of a report, except figures."""
    assert json.loads(json_text(to_document(report)), parse_constant=pytest.fail)["runs"] == str(report.root)
    to_markdown(report)
    table_files(report)
    to_page(report, {figure.name: Drawing("<svg></svg>", b"") for figure in report.figures}, report.root.parent)


def measured(report: Report) -> set[str]:
    return {name for table in report.tables for row in table.rows for name in row.runs}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "damage"), DAMAGES, ids=[f"{n}-{name}" for n, (name, _) in enumerate(DAMAGES)])
def test_damage_is_reported_in_one_line_and_hides_no_other_run(
    sound: Path, tmp_path: Path, name: str, damage: Damage
) -> None:
    before = make_report(sound, Silence())
    root = tmp_path / "runs"
    shutil.copytree(sound, root)
    damage(root / name)
    report = make_report(root, Silence())
    outputs_of(report)
    assert measured(before) - measured(report) <= {name}
    known = {line.replace(str(sound), str(root)) for line in before.problems}
    told = [line for line in report.problems if name in line.partition(": ")[0] and line not in known]
    assert len(told) == 1, report.problems
    assert all("\n" not in line and len(line) < 1000 for line in report.problems)
    follow(root)
    runs = {run.name: run for run in list_runs(root)[0]}
    if name in runs:
        compare_two(runs[name], runs["007-eval"])


@pytest.mark.parametrize("samples", [{}, {"0": (1.0, 1.0)}])
def test_too_few_samples_are_a_known_failure(samples: Samples) -> None:
    with pytest.raises(EvaluationError, match=r"no samples were measured|A standard error needs several samples"):
        paired_change([(samples, samples)], "loss")


def test_an_undamaged_folder_has_no_problems(sound: Path) -> None:
    report = make_report(sound, Silence())
    outputs_of(report)
    assert not [line for line in report.problems if "cannot be read" in line or "is not valid" in line]
    assert len(report.figures) == 8
