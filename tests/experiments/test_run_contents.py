"""Records are validated once, on reading: a wrong type or an out-of-range value gives one line, never a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mftctl.errors import RunError
from mftctl.experiments.model_source import recommended_layers, source_of_model, source_of_run
from mftctl.experiments.run_contents import first_fault, metrics_lines, sample_lines
from mftctl.experiments.run_folder import create_run, list_runs, load_run
from mftctl.experiments.run_record import RunRecord
from mftctl.reporting.paired_change import read_samples
from mftctl.reporting.reproduction import reproduction
from tests.partial_results import partial_result

DEEP = "[" * 100_000


def change(folder: Path, *path: str | int, value: Any) -> None:
    """Inserts a value into a record; Python's json writes any value."""
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    place = record
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    made = create_run(tmp_path / "runs", "eval", {"seed": 0, "data": [{"path": "a.jsonl"}], "fft": {"batch_size": 8}})
    metric = {"name": "loss", "value": 1.0, "standard_error": None, "samples": 2}
    dataset = {"name": "t", "digest": "d", "samples": "samples.jsonl", "metrics": [metric]}
    made.finish(partial_result({"state": "FFT", "datasets": [dataset]}))
    return made.folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("config", "seed"), "x"),
        (("config", "seed"), 2**70),
        (("config", "seed"), 1.5),
        (("config", "data"), "a.jsonl"),
        (("config", "data"), [{"count": 1}]),
        (("config", "fft"), None),
        (("config", "fft"), [1]),
        (("config", "fft", "batch_size"), "many"),
        (("config", "fft", "batch_size"), None),
        (("inputs",), {"parents": None}),
        (("inputs",), {"parents": [1]}),
        (("inputs",), {"digests": None}),
        (("inputs",), {"model": "a\0b"}),
        (("inputs",), {"model": "/".join(["a" * 300])}),
        (("inputs",), {"corners": ["001-fft"]}),
        (("inputs",), {"points": 10**9}),
        (("inputs",), {"chat_template": {"digest": 1}}),
        (("inputs",), {"fft_learning_rate": "0.1"}),
        (("result", "state"), ["FFT"]),
        (("result", "state"), ""),
        (("result", "datasets"), {}),
        (("result", "datasets", 0, "metrics"), "loss"),
        (("result", "datasets", 0, "metrics", 0, "value"), "1.0"),
        (("result", "datasets", 0, "metrics", 0, "value"), True),
        (("result", "datasets", 0, "metrics", 0, "value"), 1e308),
        (("result", "datasets", 0, "metrics", 0, "value"), 10**400),
        (("result", "datasets", 0, "metrics", 0, "samples"), 0),
        (("seconds",), float("nan")),
        (("seconds",), -1.0),
        (("processes",), 0),
        (("worker",), "host:" + "9" * 5000),
        (("decides",), {"files": [1]}),
        (("versions",), {"torch": 2}),
        (("status",), "paused"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else repr(value)[:20],
)
def test_a_part_of_the_wrong_type_is_one_line_and_hides_no_other(run: Path, path: tuple[str, ...], value: Any) -> None:
    other = create_run(run.parent, "fft", {})
    other.finish(partial_result({"state": "FFT"}))
    change(run, *path, value=value)
    with pytest.raises(RunError, match=r"is not valid: |not a readable run folder") as caught:
        load_run(run)
    assert "\n" not in caught.value.message
    runs, errors = list_runs(run.parent)
    assert ([item.name for item in runs], len(errors)) == ([other.name], 1)


def test_unread_parts_may_be_anything(run: Path) -> None:
    change(run, "result", value={"state": "FFT", "unheard of": [None, {"a": float("nan")}], "best_loss": float("nan")})
    assert load_run(run).record.result["state"] == "FFT"


@pytest.mark.parametrize("text", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r"])
def test_only_a_line_feed_ends_a_line(tmp_path: Path, text: str) -> None:
    row = {"id": f"a{text}b", "output": f"x{text}y", "scores": {"loss": 1.5}, "weights": {"loss": 2}}
    line = json.dumps(row, ensure_ascii=ord(text) < 0x20)
    (tmp_path / "samples.jsonl").write_text(f"{line}\n{line.replace('a', 'c')}\n", encoding="utf-8", newline="")
    assert read_samples(tmp_path / "samples.jsonl", "loss") == {f"{x}{text}b": (1.5, 2) for x in "ac"}


@pytest.mark.parametrize(
    "line",
    [
        "",
        "no json",
        "[1]",
        DEEP,
        '{"id": 1, "scores": {}}',
        '{"id": "a"}',
        '{"id": "a", "scores": {"loss": "1"}}',
        '{"id": "a", "scores": {"loss": 1e308}}',
        '{"id": "a", "scores": {"loss": 1}, "weights": {"loss": -1}}',
        '{"id": "a", "scores": {"loss": 1}, "weights": {"loss": Infinity}}',
        '{"id": "\\ud800", "scores": {}}',
    ],
    ids=lambda line: line[:40],
)
def test_a_damaged_sample_is_named_by_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(f'{{"id": "0", "scores": {{}}}}\n{line}\n{{"id": "2", "scores": {{}}}}\n', encoding="utf-8")
    with pytest.raises(RunError, match=r"samples\.jsonl:2 cannot be read") as caught:
        sample_lines(path)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("score", ["NaN", "Infinity", "-Infinity"])
def test_a_score_that_is_not_a_number_is_reported(tmp_path: Path, score: str) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(f'{{"id": "0", "scores": {{"loss": {score}, "exact_match": 1}}}}\n', encoding="utf-8")
    with pytest.raises(RunError, match=r"loss of a sample .* is not a number"):
        read_samples(path, "loss")
    assert read_samples(path, "exact_match") == {"0": (1, 1.0)}


@pytest.mark.parametrize(
    "line", ['{"loss": 1}', '{"step": "1"}', '{"step": 1e400}', '{"step": 1, "epoch": NaN}', DEEP, "{", "\xff"]
)
def test_a_damaged_line_of_metrics_is_named_and_one_that_a_kill_cut_short_is_left_out(
    tmp_path: Path, line: str
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0, "eval_loss": NaN}\n' + line.encode("latin-1"))
    assert [item.step for item in metrics_lines(path)] == [0]
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(RunError, match=r"metrics\.jsonl:2 cannot be read"):
        metrics_lines(path)


def test_a_fault_is_reported_in_one_line() -> None:
    assert first_fault(KeyError("a\nb")) == "a b is missing"
    assert first_fault(ValueError("one\ntwo")) == "one"
    assert first_fault(RunError("said", path="x")) == "said"


@pytest.mark.parametrize("key", ["model", "state"])
def test_a_run_without_outputs_in_its_record_is_named(tmp_path: Path, key: str) -> None:
    run = create_run(tmp_path, "fft", {}, inputs={"model": "m", "parents": [], "origin": "m"})
    run.finish(partial_result({name: "x" for name in ("state", "model") if name != key}))
    if key == "model":
        change(run.folder, "inputs", value={"parents": [], "origin": "m"})
    with pytest.raises(RunError, match="incomplete"):
        source_of_run(load_run(run.folder))
    assert source_of_model("elsewhere", tmp_path).model == "elsewhere"


def test_a_probe_without_a_recommendation_recommends_nothing(tmp_path: Path) -> None:
    create_run(tmp_path, "probe", {}, inputs={"model": "m"}).finish(partial_result({"groups": []}))
    create_run(tmp_path, "probe", {}).finish(partial_result({"recommended_layers": "4-7"}))
    assert recommended_layers(tmp_path, source_of_model("m", tmp_path)) is None


@pytest.mark.parametrize("command", ["apply", "eval", "surface"])
def test_a_run_without_recorded_inputs_has_no_command(tmp_path: Path, command: str) -> None:
    run = create_run(tmp_path, command, {})
    with pytest.raises(RunError, match=f"{run.name} lacks its (model|points)"):
        reproduction(run)


def test_every_checked_part_exists_in_a_record() -> None:
    from mftctl.experiments.run_contents import _Record

    assert set(_Record.model_fields) <= set(RunRecord.__dataclass_fields__)
