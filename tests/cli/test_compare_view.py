from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mftctl.cli.compare_view import show_comparison
from mftctl.cli.output import Output
from mftctl.errors import RunError
from mftctl.experiments.find_run import find_run
from mftctl.masking.mask import save_mask
from mftctl.reporting.two_runs import compare_two
from tests.masking.mask_files import build_mask
from tests.reporting.run_folders import make_samples, write_evaluation


@pytest.fixture
def root(tmp_path: Path) -> Path:
    base, new = make_samples(1, loss=0.3, correct=0.4), make_samples(2, loss=0.2, correct=0.4)
    write_evaluation(tmp_path, 3, "FFT", ["001-fft"], base)
    write_evaluation(tmp_path, 4, "MFT [x]", ["001-fft", "002-mask-train"], new, seed=1, data="other[b].jsonl")
    return tmp_path


def shown(root: Path, one: str, other: str, capsys: pytest.CaptureFixture[str], *, as_json: bool = False) -> str:
    with Output(as_json=as_json) as console:
        show_comparison(console, root, one, other)
    return capsys.readouterr().out


def test_tables_show_differences_and_the_verdict(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(root, "3", "4", capsys)
    for line in ("Settings", "│ seed", "other[b].jsonl", "Inputs", "Versions: no difference", "Results", "MFT [x]"):
        assert line in text
    row = next(line for line in text.splitlines() if line.startswith("│ test.jsonl, loss"))
    change = compare_two(find_run(root, "3"), find_run(root, "4")).metrics[0].change
    assert f"{change.value:+.4f}" in row
    assert "better" in row
    assert "datasets.test.jsonl.metrics" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_values_of_many_steps_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (1, 2):
        folder = tmp_path / f"00{number}-fft"
        folder.mkdir()
        evaluations = [{"step": step, "dataset": "d", "value": step * number} for step in range(5)]
        result = {"evaluations": evaluations, "best_loss": 1.0 * number}
        record = {"command": "fft", "status": "finished", "started": "", "config": {}, "result": result}
        (folder / "run.json").write_text(json.dumps(record))
    text = shown(tmp_path, "1", "2", capsys)
    assert "evaluations: 4 differences in values per step (--json lists them)" in text
    assert "evaluations.d" not in text
    assert "│ best_loss" in text
    assert len(json.loads(shown(tmp_path, "1", "2", capsys, as_json=True))["results"]) == 5


def test_run_and_itself_have_no_difference(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(root, "3", "003-eval", capsys)
    for part in ("Settings", "Inputs", "Versions", "Results"):
        assert f"{part}: no difference" in text
    assert "within noise" in text


def test_document_holds_the_whole_comparison(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads(shown(root, "3", "4", capsys, as_json=True))
    found = compare_two(find_run(root, "3"), find_run(root, "4"))
    assert [item["key"] for item in document["results"]] == [item.key for item in found.results]
    assert document["metrics"][0]["change"]["low"] == found.metrics[0].change.low
    assert (document["one"], document["mask"], document["problems"]) == ("003-eval", None, [])


def test_masks_have_their_overlap_and_the_next_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = {"command": "mask-train", "status": "finished", "started": "", "config": {}}
    for number in (1, 2):
        keep = torch.ones(2, 10, dtype=torch.bool)
        keep[0, : 2 * number] = False
        folder = tmp_path / f"00{number}-mask-train"
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps(record))
        more = {"other.weight": keep} if number == 2 else {}
        save_mask(build_mask(**{"a.weight": keep}, **more), folder / "mask.bits")
    with Output() as console:
        show_comparison(console, tmp_path, "1", "2")
    captured = capsys.readouterr()
    assert "Jaccard                    0.5000; expected by chance 0.0714" in captured.out
    assert "only in 002-mask-train     1 tensor, for example other.weight" in captured.out
    assert "Next: mftctl mask diff" in captured.err


def test_problems_are_warnings(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "004-eval" / "samples.jsonl").unlink()
    with Output() as console:
        show_comparison(console, root, "3", "4")
    captured = capsys.readouterr()
    assert "Warning: test.jsonl, loss: The samples in 004-eval/samples.jsonl cannot be read." in captured.err
    assert "datasets.test.jsonl.metrics.loss.value" in captured.out.replace("\n", "")


def test_missing_run_is_an_error_of_find_run(root: Path) -> None:
    with pytest.raises(RunError, match="There is no such run"), Output() as console:
        show_comparison(console, root, "3", "44")
