"""`mftctl data show` and `mftctl data stats`: what is shown, and where it goes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from mftctl.cli.data_view import show_views, stats_views
from mftctl.cli.record_view import record_text
from mftctl.data.rendering import Segment
from mftctl.workflows.data_show import ShownData, ShownRecord
from mftctl.workflows.data_stats import (
    DataStats,
    Found,
    LengthBin,
    Lengths,
    Overlap,
    PartStats,
    RecordPair,
    TokenStats,
)
from tests.cli.running import CommandLine


def lines_of(*views: RenderableType) -> list[str]:
    console = Console(width=100)
    with console.capture() as capture:
        for view in views:
            console.print(view)
    return [" ".join(line.split()) for line in capture.get().splitlines()]


RECORD = ShownRecord(
    2, "d.jsonl:2", "used", None, 9, 2, 5, ("a remark",), (Segment("q [b]", False), Segment("a", True))
)


def test_a_record_that_is_truncated() -> None:
    text = "\n".join(lines_of(*show_views(ShownData("m", 1200, 9, (RECORD,)))))
    assert "2 of 1,200, d.jsonl:2: trains on 2 of 9 tokens, those between » and «" in text
    assert "truncated at --max-length 9: 5 tokens cut\na remark\nq [b]»a«" in text


def test_a_record_that_is_dropped() -> None:
    dropped = replace(RECORD, outcome="dropped", error="Too long (expected: short)", segments=())
    assert lines_of(*show_views(ShownData("m", 3, 9, (dropped,))))[:2] == [
        "2 of 3, d.jsonl:2: dropped",
        "Too long (expected: short)",
    ]


def test_colours_on_a_terminal() -> None:
    console = Console(force_terminal=True, color_system="standard", no_color=False, width=80)
    with console.capture() as capture:
        console.print(record_text("head", [("1+1", False), ("2", True)], marked=False))
    assert "\x1b[2m1+1\x1b[0m\x1b[32m2\x1b[0m" in capture.get()


def test_tables_of_statistics() -> None:
    none = Found(0, 0.0, ())
    some = Found(2, 0.25, (RecordPair("t:1", "d:7"), RecordPair("t:2", "d:9")))
    lengths = Lengths(4, 5, 6, 7, 9, (LengthBin(4, 5, 20), LengthBin(6, 7, 1), LengthBin(8, 11, 0)))
    tokens = TokenStats(1234, 99, 5, 3, 0.375, 1, lengths)
    train = PartStats("train", 8, 1, ("It is bad (where: d:3)",), some, none, tokens)
    test = PartStats("test", 8, 0, (), none, none, None)
    lines = lines_of(*stats_views(DataStats("m", 64, (train, test), (Overlap("test", "train", none, none, some),))))
    for line in (
        "records 8 8",
        "same content as an earlier record 2 (25.0%) 0",
        "tokens 1,234",
        "truncated at 64 3 (37.5%)",
        f"4 to 5 tokens 20 {'#' * 40}",
        "6 to 7 tokens 1 ##",
        "8 to 11 tokens 0",
        "test train 0 0 2 (25.0%)",
        "train, refused: It is bad (where: d:3)",
        "test and train, 13 words in a row: t:1 = d:7; t:2 = d:9",
    ):
        assert line in lines


@pytest.mark.slow
def test_show_in_an_empty_folder_shows_the_built_in_data(mftctl: CommandLine) -> None:
    outcome = mftctl("data", "show")
    assert outcome.code == 0, outcome.stderr
    assert "Model: quickstart" in outcome.stderr
    assert outcome.stdout.count("#### ") == 3
    assert "1 of 500, " in outcome.stdout


@pytest.mark.slow
def test_show_a_file(mftctl: CommandLine, workspace: Path) -> None:
    arguments = ("data", "show", workspace / "train.jsonl", "-m", workspace / "tiny", "--index", 3)
    document = json.loads(mftctl(*arguments, "--json").stdout)
    assert document["records"] == 48
    [record] = document["shown"]
    assert record["where"].endswith("train.jsonl:3")
    assert [part["is_answer"] for part in record["segments"]] == [False, True]
    assert "<|assistant|>»" in mftctl(*arguments).stdout


@pytest.mark.slow
def test_show_chooses_one_way(mftctl: CommandLine, workspace: Path) -> None:
    outcome = mftctl("data", "show", workspace / "train.jsonl", "--index", 1, "--sample", 1)
    assert outcome.code == 2
    assert "are mutually exclusive" in outcome.stderr


@pytest.mark.slow
def test_stats_without_a_model_count_no_tokens(mftctl: CommandLine, workspace: Path) -> None:
    arguments = ("data", "stats", "-d", workspace / "train.jsonl", "--test-data", workspace / "test.jsonl")
    document = json.loads(mftctl(*arguments, "--json").stdout)
    assert document["model"] is None
    assert [(part["part"], part["tokens"]) for part in document["parts"]] == [
        ("train", None),
        ("validation", None),
        ("test", None),
    ]
    assert sum(part["records"] for part in document["parts"]) == 64


@pytest.mark.slow
def test_stats_with_a_model(mftctl: CommandLine, workspace: Path) -> None:
    arguments = ("data", "stats", "-d", workspace / "train.jsonl", "-m", workspace / "tiny", "--max-length", 20)
    outcome = mftctl(*arguments)
    assert outcome.code == 0, outcome.stderr
    assert "truncated at 20" in outcome.stdout
    assert "Lengths: train" in outcome.stdout


@pytest.mark.slow
def test_stats_of_a_recipe(mftctl: CommandLine) -> None:
    document = json.loads(mftctl("data", "stats", "-r", "quickstart", "--json").stdout)
    assert [part["records"] for part in document["parts"]] == [500, 400, 1000]
    assert document["max_length_tokens"] == 128
    assert document["overlaps"][0]["same_prompt"]["records"] == 0


@pytest.mark.parametrize(
    ("arguments", "length"),
    [
        ((), 1024),
        (("--set", "mask_train.max_length_tokens=99"), 99),
        (("--set", "mask_train.max_length_tokens=99", "--max-length", 50), 50),
    ],
)
def test_the_maximum_length_is_that_of_training(
    mftctl: CommandLine, workspace: Path, arguments: tuple[object, ...], length: int
) -> None:
    outcome = mftctl("data", "stats", "-d", workspace / "train.jsonl", "--json", *arguments)
    assert json.loads(outcome.stdout)["max_length_tokens"] == length


@pytest.mark.slow
def test_no_cache_leaves_nothing(
    mftctl: CommandLine, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MFTCTL_CACHE", str(tmp_path / "cache"))
    arguments = ("data", "show", workspace / "train.jsonl", "-m", workspace / "tiny", "--json")
    without = mftctl(*arguments, "--no-cache")
    assert not (tmp_path / "cache").exists()
    monkeypatch.setenv("MFTCTL_CACHE", str(tmp_path / "cache"))
    assert mftctl(*arguments).stdout == without.stdout
    assert len([entry for entry in (tmp_path / "cache" / "data").iterdir() if entry.is_dir()]) == 1
