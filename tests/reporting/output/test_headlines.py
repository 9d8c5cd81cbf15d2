from __future__ import annotations

import dataclasses

from mftctl.experiments.state_names import known_state
from mftctl.reporting.output.headlines import Headline, headlines
from mftctl.reporting.paired_change import Change
from mftctl.reporting.state_tables import MetricTable, Row
from mftctl.reporting.strongest_control import AgainstControl

BETTER = Change(-0.02, -0.03, -0.01, "better")


def make_row(state: str, value: float, change: Change | None, run: str = "004-eval") -> Row:
    return Row(state, value, None, None, 1_500, (0,), state == "FFT", change, (run,), made=known_state(state))


def make_table(*rows: Row, origin: str = "models/base", metric: str = "loss") -> MetricTable:
    return MetricTable(origin, "test.jsonl", metric, "FFT", rows)


def test_the_best_learned_mask_is_stated_with_its_interval() -> None:
    rows = (
        make_row("FFT", 0.5, None),
        make_row("MFT, paper", 0.49, BETTER, "005-eval"),
        make_row("MFT", 0.48, BETTER),
        make_row("L1 mask", 0.4, BETTER),
    )
    assert headlines([make_table(*rows)]) == [
        Headline(
            "MFT changes loss on test.jsonl by -0.0200 [-0.0300, -0.0100] against FFT: better (1,500 samples).",
            "better",
            ("004-eval",),
        )
    ]
    [higher] = headlines([make_table(*rows, metric="exact_match")])
    assert higher.runs == ("005-eval",)


def test_seeds_and_models_are_named_where_there_are_several() -> None:
    row = dataclasses.replace(make_row("MFT", 0.48, BETTER), seeds=(0, 1, 2))
    one, other = headlines([make_table(row), make_table(row, origin="models/other")])
    assert "test.jsonl for base by" in one.text
    assert "test.jsonl for other by" in other.text
    assert one.text.endswith("(1,500 samples, 3 seeds).")


def test_without_a_learned_mask_there_is_no_headline() -> None:
    assert headlines([make_table(make_row("FFT", 0.5, None), make_row("random mask", 0.6, BETTER))]) == []
    assert headlines([make_table(make_row("MFT", 0.5, None))]) == []


def test_the_strongest_control_is_named_first() -> None:
    control = AgainstControl("continued FFT (fft averaged)", Change(0.01, -0.01, 0.03, "within noise"), False)
    row = dataclasses.replace(make_row("MFT", 0.48, BETTER), against_control=control)
    [found] = headlines([make_table(row)])
    assert found.verdict == "within noise"
    assert found.text == (
        "MFT changes loss on test.jsonl by +0.0100 [-0.0100, +0.0300] against continued FFT (fft averaged), its "
        "strongest control: within noise (1,500 samples). Against FFT: -0.0200 [-0.0300, -0.0100], better. MFT beats "
        "only the weaker of the two."
    )
    better = dataclasses.replace(row, against_control=dataclasses.replace(control, change=BETTER))
    [found] = headlines([make_table(better)])
    assert found.verdict == "better"
    assert found.text.endswith("Against FFT: -0.0200 [-0.0300, -0.0100], better.")


def test_a_baseline_that_is_the_strongest_control_is_named_once() -> None:
    row = dataclasses.replace(make_row("MFT", 0.48, BETTER), against_control=AgainstControl("FFT", BETTER, True))
    fft, more = make_row("FFT", 0.5, None), make_row("continued FFT", 0.6, BETTER)
    [found] = headlines([make_table(fft, row)])
    assert found.text.endswith("against FFT: better (1,500 samples). No other control was measured.")
    [found] = headlines([make_table(fft, more, row)])
    assert found.text.endswith("against FFT: better (1,500 samples).")


def test_data_to_retain_has_no_headline() -> None:
    rows = (make_row("FFT", 0.5, None), make_row("MFT", 0.48, BETTER))
    retained = MetricTable("models/base", "retained", "loss", "FFT", rows)
    assert headlines([retained]) == []
    assert headlines([make_table(*rows), retained]) == headlines([make_table(*rows)])
    assert len(headlines([dataclasses.replace(retained, is_benchmark=True)])) == 1
