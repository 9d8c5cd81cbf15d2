"""Results as stored and read back; the folders next to this file have format version 1."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from mftctl.errors import RunError
from mftctl.experiments.combined_results import AverageResult, InterpolateResult, ShareLoss
from mftctl.experiments.mask_results import DroppedMask, MaskTrainResult, MeasuredMask
from mftctl.experiments.model_source import recommendation_of, source_of_run
from mftctl.experiments.probe_results import FastProbe, ProbeResult, TrainedGroup, TrainedProbe
from mftctl.experiments.result_kinds import read_result
from mftctl.experiments.results import ApplyResult, EvalResult, FftResult, Outcome, Result
from mftctl.experiments.run_contents import metrics_lines, read_part, sample_lines
from mftctl.experiments.run_folder import create_run, list_runs, load_run
from mftctl.experiments.run_record import FORMAT_VERSION, RunStatus
from mftctl.progress import Silence
from mftctl.reporting.output.write import to_document
from mftctl.reporting.report import make_report
from tests.partial_results import partial_result

FOLDERS = Path(__file__).parent / "run_folders_v1"
FINISHED = {
    "001-eval": EvalResult,
    "002-fft": FftResult,
    "003-fft": FftResult,
    "004-probe": TrainedProbe,
    "005-mask-train": MeasuredMask,
    "006-mask-train": MeasuredMask,
    "007-mask-train": MeasuredMask,
    "008-apply": ApplyResult,
    "009-eval": EvalResult,
    "010-eval": EvalResult,
    "011-eval": EvalResult,
    "012-eval": EvalResult,
    "013-eval": EvalResult,
    "040-probe": FastProbe,
    "042-probe": TrainedProbe,
}
DROPPED = {
    "state": "trivial drop",
    "model": "m",
    "base": "b",
    "mask": "mask.bits",
    "output": None,
    "tensors": 1,
    "weights": 8,
    "removed": 2,
    "ratio": 0.25,
    "layers": "all",
    "layer_ratios": {},
    "steps": 0,
    "peak_memory_bytes": 1,
}


def test_the_folders_of_version_1_are_all_read() -> None:
    runs, errors = list_runs(FOLDERS)
    assert errors == []
    assert {run.record.format_version for run in runs} == {1}
    statuses = {run.name: run.record.status for run in runs}
    assert statuses == {**dict.fromkeys(FINISHED, "finished"), "043-fft": "failed", "044-fft": "interrupted"}
    assert {type(status) for status in statuses.values()} == {RunStatus}


@pytest.mark.parametrize(("name", "kind"), FINISHED.items())
def test_a_result_of_version_1_is_read_typed_and_written_as_it_was(name: str, kind: type[Result]) -> None:
    record = load_run(FOLDERS / name).record
    result = read_result(record.command, record.result)
    assert type(result) is kind
    assert result.document() == record.result
    assert json.dumps(result.document(), sort_keys=True) == json.dumps(record.result, sort_keys=True)


@pytest.mark.parametrize("path", sorted(FOLDERS.glob("*/metrics.jsonl")), ids=lambda path: path.parent.name)
def test_metrics_of_version_1_are_read_typed_and_written_as_they_were(path: Path) -> None:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = metrics_lines(path)
    assert [json.dumps(line.document(), sort_keys=True) for line in found] == [
        json.dumps(row, sort_keys=True) for row in rows
    ]
    assert [line.step for line in found] == [row["step"] for row in rows]


def test_samples_and_groups_of_version_1_are_read_typed() -> None:
    rows = [json.loads(line) for line in (FOLDERS / "009-eval" / "samples.jsonl").read_text().splitlines()]
    samples = sample_lines(FOLDERS / "009-eval" / "samples.jsonl")
    assert [(sample.id, sample.scores, sample.weights) for sample in samples] == [
        (row["id"], row["scores"], row["weights"]) for row in rows
    ]
    groups = [read_part(path, TrainedGroup) for path in (FOLDERS / "042-probe" / "groups").glob("*/outcome.json")]
    ranked = load_run(FOLDERS / "042-probe").result(TrainedProbe).groups
    assert sorted(groups, key=lambda group: ranked.index(group)) == ranked
    assert all(group.score is not None for group in ranked)


def test_the_report_of_folders_of_version_1_is_unchanged() -> None:
    """The numbers are those that mftctl computed from these folders before results were typed.

    Names of baselines, comparisons with the strongest control, the headlines that quote them, changed answers, and
    preferences were added later.
    """
    text = json.dumps(to_document(make_report(FOLDERS, Silence())), default=str)
    found = json.loads(text.replace(json.dumps(str(FOLDERS))[1:-1], "RUNS"))
    expected = json.loads((FOLDERS / "report.json").read_text(encoding="utf-8"))
    for table in found["tables"]:
        for row in table["rows"]:
            del row["against_control"], row["against"]
    for overview in found["overviews"]:
        assert not overview.pop("has_several_baselines")
        for _, cells in overview["rows"]:
            for cell in cells:
                del cell["against"]
    del found["headlines"], expected["headlines"], found["answers"]
    assert found.pop("preferences") == []
    # From Python 3.12 on, `sum` compensates for rounding errors of floats.
    assert rounded(found) == rounded(expected)


def rounded(value: object) -> object:
    """The same document with its numbers rounded to 12 digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.12g}") if isinstance(value, float) else value


def test_later_stages_use_results_of_earlier_ones(tmp_path: Path) -> None:
    fft, mask = load_run(FOLDERS / "002-fft"), load_run(FOLDERS / "006-mask-train")
    source = source_of_run(mask)
    assert (source.model, source.state) == (fft.result(FftResult).model, "MFT, paper")
    recommended = recommendation_of(load_run(FOLDERS / "004-probe"))
    assert (recommended.layers, recommended.run) == ("4-7", "004-probe")


def test_a_record_begins_with_its_format_version(tmp_path: Path) -> None:
    run = create_run(tmp_path, "apply", {})
    result = ApplyResult(state="MFT", model="m", base="b", bytes_written=1, tensors_masked=2, removed=3)
    run.finish(result)
    document = json.loads((run.folder / "run.json").read_text(encoding="utf-8"))
    assert next(iter(document.items())) == ("format_version", FORMAT_VERSION)
    assert load_run(run.folder).result(ApplyResult) == result


def test_a_resumed_run_of_version_1_gets_the_current_version(tmp_path: Path) -> None:
    folder = shutil.copytree(FOLDERS / "044-fft", tmp_path / "044-fft")
    load_run(folder).go_on()
    assert load_run(folder).record.format_version == FORMAT_VERSION


@pytest.mark.parametrize("changes", [{}, {"config": [], "unheard of": 1}, {"result": {"state": ["FFT"]}}])
def test_a_newer_format_is_one_clear_line_and_hides_no_other(tmp_path: Path, changes: dict[str, Any]) -> None:
    newer, other = create_run(tmp_path, "fft", {}), create_run(tmp_path, "fft", {})
    document = json.loads((newer.folder / "run.json").read_text(encoding="utf-8"))
    document |= {"format_version": FORMAT_VERSION + 1, **changes}
    (newer.folder / "run.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(RunError) as caught:
        load_run(newer.folder)
    assert caught.value.message == "This run was written by a newer version of mftctl."
    assert (caught.value.key, caught.value.actual) == ("format_version", FORMAT_VERSION + 1)
    runs, errors = list_runs(tmp_path)
    assert ([run.name for run in runs], len(errors)) == ([other.name], 1)


@pytest.mark.parametrize("version", [0, -1, "two", None, 1.5, [2]])
def test_an_invalid_format_version_is_not_read(tmp_path: Path, version: Any) -> None:
    run = create_run(tmp_path, "fft", {})
    document = json.loads((run.folder / "run.json").read_text(encoding="utf-8"))
    (run.folder / "run.json").write_text(json.dumps({**document, "format_version": version}), encoding="utf-8")
    with pytest.raises(RunError, match=r"not a readable run folder|not valid: format_version"):
        load_run(run.folder)


@pytest.mark.parametrize(("name", "kind"), FINISHED.items())
def test_a_key_missing_from_a_result_is_named(tmp_path: Path, name: str, kind: type[Result]) -> None:
    folder = shutil.copytree(FOLDERS / name, tmp_path / name)
    for key in [key for key, field in kind.model_fields.items() if field.is_required()]:
        run = load_run(folder)
        run.record.result.pop(key)
        with pytest.raises(RunError, match=rf"incomplete: {key} is missing\.") as caught:
            run.result(kind)
        assert caught.value.path == str(folder / "run.json")
        run.result(Outcome)


def test_both_kinds_of_mask_and_probe_results_are_told_apart() -> None:
    assert isinstance(MaskTrainResult.read(DROPPED), DroppedMask)
    assert MaskTrainResult.read(DROPPED).document() == DROPPED
    fast = load_run(FOLDERS / "040-probe").record.result
    assert isinstance(ProbeResult.read(fast), FastProbe)
    with pytest.raises(ValidationError):
        TrainedProbe.read(fast)


def test_results_of_combined_checkpoints_are_read_as_they_were_written(tmp_path: Path) -> None:
    average = AverageResult(state="averaged", model="m", weights=[1.5, -0.5], tensors_averaged=2, bytes_written=3)
    between = InterpolateResult(
        state="interpolated",
        model="m",
        output_refused=None,
        base="b",
        share=0.5,
        best_loss=0.6,
        losses=[ShareLoss(share=0.5, loss=0.6), ShareLoss(share=1.0, loss=float("inf"))],
        tensors=2,
        peak_memory_bytes=1,
    )
    for command, result in (("average", average), ("interpolate", between)):
        run = create_run(tmp_path, command, {})
        run.finish(result)
        record = load_run(run.folder).record
        assert read_result(command, record.result) == result
        assert load_run(run.folder).result(type(result)) == result
    outcome = load_run(tmp_path / "002-interpolate").result(Outcome)
    assert (outcome.best_loss, outcome.base, outcome.state) == (0.6, "b", "interpolated")
    assert between.tuned_loss == float("inf")


def test_only_a_refused_output_is_stored() -> None:
    refused = DroppedMask.model_validate({**DROPPED, "output_refused": "it is in the way"})
    assert refused.document()["output_refused"] == "it is in the way"
    assert "output_refused" not in DroppedMask(**DROPPED, output_refused=None).document()


@pytest.mark.parametrize(
    ("command", "path", "value"),
    [
        ("002-fft", ("tokens",), -1),
        ("002-fft", ("kept",), 1),
        ("002-fft", ("flops_per_token",), float("inf")),
        ("004-probe", ("groups", 0, "size"), 0),
        ("004-probe", ("groups", 0, "change"), 1e308),
        ("004-probe", ("recommended_layers",), 4),
        ("006-mask-train", ("flips", "rounds", 0, "step"), "8"),
        ("006-mask-train", ("layer_ratios",), {"4": "a tenth"}),
        ("006-mask-train", ("mask",), "a\0b"),
        ("008-apply", ("model",), "/".join(["a" * 300])),
        ("009-eval", ("datasets", 0, "metrics", 0, "samples"), 0),
        ("040-probe", ("fast",), "yes"),
        ("042-probe", ("unmasked_score", "value"), "0.5"),
    ],
)
def test_a_result_of_another_type_or_out_of_bounds_is_not_sound(
    tmp_path: Path, command: str, path: tuple[str | int, ...], value: Any
) -> None:
    folder = shutil.copytree(FOLDERS / command, tmp_path / command)
    document = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    place = document["result"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (folder / "run.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(RunError, match=rf"not valid: result\.{path[0]}"):
        load_run(folder)


def test_a_part_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "outcome.json").write_text('{"layers": 4}', encoding="utf-8")
    with pytest.raises(RunError, match="part of a result cannot be read") as caught:
        read_part(tmp_path / "outcome.json", TrainedGroup)
    assert "\n" not in str(caught.value.actual)


def test_results_are_frozen(tmp_path: Path) -> None:
    result = load_run(FOLDERS / "002-fft").result(FftResult)
    with pytest.raises(ValidationError):
        result.state = "MFT"  # type: ignore[misc]


def test_an_incomplete_probe_still_recommends_layers(tmp_path: Path) -> None:
    run = create_run(tmp_path, "probe", {})
    run.finish(partial_result({"recommended_layers": "0-3"}))
    assert recommendation_of(run).layers == "0-3"
    with pytest.raises(RunError, match="is missing"):
        run.result(ProbeResult)


def test_a_measured_delta_mask_is_told_from_a_dropped_one() -> None:
    measured = load_run(FOLDERS / "005-mask-train").record.result
    delta = MaskTrainResult.read({**measured, "base": "b"})
    assert isinstance(delta, MeasuredMask)
    assert (delta.base, delta.document()) == ("b", {**measured, "base": "b"})
    assert isinstance(MaskTrainResult.read(DROPPED), DroppedMask)
    plain = MaskTrainResult.read(measured)
    assert isinstance(plain, MeasuredMask)
    assert plain.base is None
