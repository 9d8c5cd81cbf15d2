"""One clear message per mistake, on stderr, with the right exit code and nothing on stdout."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.running import CommandLine


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["probe"], 2, "probe needs a model"),
        (["mask-train"], 2, "mask-train needs a model"),
        (["apply"], 2, "apply needs a base model and a mask"),
        (["apply", "somewhere"], 2, "apply needs a mask as well as a base model"),
        (["eval"], 2, "eval needs a model"),
        (["eval", "--mask", "mask.bits"], 2, "eval needs a model"),
        (["report"], 1, "no finished run"),
        (["report", "1"], 2, "A comparison needs exactly two runs"),
        (["report", "1", "2", "3"], 2, "A comparison needs exactly two runs"),
        (["report", "1", "2"], 1, "There is no such run"),
        (["report", "1", "2", "--watch"], 2, "These options are mutually exclusive"),
        (["report", "--surface", "--watch"], 2, "These options are mutually exclusive"),
        (["report", "--surface-points", "5"], 2, "add --surface"),
        (["report", "--device", "cpu"], 2, "--device applies only with --surface"),
        (["fft", "--device", "gpu"], 2, "auto, cpu, cuda, cuda:N, mps or xpu"),
        (["fft", "--attention", "flash"], 2, "attention"),
        (["report", "--surface", "--surface-points", "2"], 2, "at least 4"),
        (["report", "--surface"], 1, "mftctl fft"),
        (["run", "nonsense"], 2, "The recipe does not exist"),
        (["run"], 2, "Missing argument"),
        (["fft", "--resume"], 1, "no stopped fft run"),
        (["fft", "--resume", "--lr", "1e-4"], 2, "keeps its settings"),
        (["fft", "--set", "fft.epoch=2"], 2, "did you mean epochs"),
        (["fft", "--set", "ratio=0.2"], 2, "did you mean fft.ratio, delta.ratio or mask_train.ratio"),
        (["fft", "--set", "seed"], 2, "--set needs a key and a value"),
        (["fft", "--eval-steps", "3"], 2, "No such option: --eval-steps (Possible options: --val-steps)"),
        (["mask-train", "--eval-every", "3"], 2, "(Possible options: --benchmark-every)"),
        (["mask-train", "--eval-limit=3"], 2, "(Possible options: --benchmark-limit)"),
        (["fft", "--val-step", "3"], 2, "--val-steps"),
        (["mask-train", "--start", "magnitude", "-m", "m", "-d", "d"], 2, "did you mean weights?"),
        (["mask-train", "--ranking", "magnitude", "-m", "m", "-d", "d"], 2, "did you mean absolute?"),
        (["fft", "--set", "fft.eval_steps=3"], 2, "did you mean val_steps?"),
        (["fft", "--epochs", "many"], 2, "Invalid value"),
        (["fft", "--precision", "fp8"], 2, "fft.precision"),
        (["fft", "--tasks", "gsm8k"], 2, "Benchmarks during training need an interval"),
        (["fft", "-d", "missing.jsonl"], 1, "missing.jsonl"),
        (["fft", "-m", "./nowhere", "-d", "data.jsonl"], 1, "nowhere"),
        (["mask-train", "--ratio", "1.0", "-m", "m", "-d", "d"], 2, "mask_train.ratio"),
        (
            ["mask-train", "--ratio", "0.1", "--threshold", "0", "-m", "m", "-d", "d"],
            2,
            "either a ratio, a threshold or a pattern",
        ),
        (["mask-train", "--method", "random", "--threshold", "0", "-m", "m"], 2, "needs learned scores"),
        (["mask", "info", "missing.bits"], 1, "missing.bits"),
        (["probe", "--groups", "four", "-m", "m", "-d", "d"], 2, "Group sizes must be whole numbers"),
        (["probe", "--by", "coding", "-m", "m", "-d", "d"], 2, "must be a single benchmark"),
        (["probe", "--by", "gsm8k", "--fast", "-m", "m", "-d", "d"], 2, "only predicts the loss"),
        (["probe", "--task-data", "gsm8k=g.jsonl", "-m", "m", "-d", "d"], 2, "mftctl probe --by gsm8k"),
        (["probe", "--limit", "5", "-m", "m", "-d", "d"], 2, "uses only the problems"),
        (["mask-train", "--unit", "row", "-m", "m", "-d", "d"], 2, "applies only to the method magnitude"),
        (["fft", "--exclude", "head", "-m", "m", "-d", "d"], 2, "only to the methods gmt and random"),
        (["fft", "--method", "gmt", "--exclude", "norms", "-m", "m", "-d", "d"], 2, "fft.exclude"),
        (["eval", "m", "--task-data", "gsm8k"], 2, "needs the name of its task"),
        (["nonsense"], 2, "No such command"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake(mftctl: CommandLine, arguments: list[str], code: int, message: str) -> None:
    (mftctl.folder / "data.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n' * 30)
    outcome = mftctl(*arguments)
    assert outcome.code == code, outcome.stderr
    assert message in " ".join(outcome.stderr.replace("│", " ").split())
    assert outcome.stdout == ""
    assert "Traceback" not in outcome.stderr


def test_off_a_terminal_a_missing_value_names_its_option(mftctl: CommandLine, workspace: Path) -> None:
    outcome = mftctl("fft", "-m", workspace / "tiny")
    assert outcome.code == 2
    assert "--data" in outcome.stderr


def test_a_failure_is_kept_in_the_run(mftctl: CommandLine, workspace: Path) -> None:
    bad = mftctl.folder / "bad.jsonl"
    bad.write_text('{"question": "1+1?", "answer": "2"}\nnot json\n')
    outcome = mftctl("fft", "-m", workspace / "tiny", "-d", bad)
    assert outcome.code == 1
    assert "bad.jsonl:2" in outcome.stderr
    record = (mftctl.folder / "runs" / "001-fft" / "run.json").read_text()
    assert '"status": "failed"' in record


def test_markup_in_a_message_is_shown_as_it_is(mftctl: CommandLine) -> None:
    outcome = mftctl("run", "[bold]x[/bold]")
    assert "[bold]x[/bold]" in outcome.stderr


def test_an_unknown_error_shows_its_traceback(mftctl: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("mftctl.reporting.report.make_report", broken)
    with pytest.raises(ZeroDivisionError):
        mftctl("report")
