"""The speed and memory comparisons run at small sizes; times are not checked because machines are shared."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from mftctl.experiments.run_folder import list_runs
from tests.benchmarks import (
    allocator_speed,
    apply_speed,
    codec_speed,
    data_speed,
    delta_speed,
    eval_speed,
    gmt_step_speed,
    listing_speed,
    mask_memory,
    mask_step_speed,
    probe_speed,
)
from tests.benchmarks.shapes import TINY
from tests.conftest import build_llama, build_tokenizer
from tests.workflow_fixtures import write_additions


@pytest.mark.slow
def test_eval_speed(tmp_path: Path) -> None:
    build_llama(max_position_embeddings=8192).save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    file = write_additions(tmp_path / "test.jsonl", 6, seed=0)
    found = eval_speed.compare(
        tmp_path / "model", "gsm8k_0shot", file, limit=5, batch_size=2, max_new_tokens=8, repetitions=2
    )
    assert len(found) == 5
    assert all(text.count(",") == 2 for text in found.values())


@pytest.mark.slow
def test_mask_step_speed() -> None:
    found = mask_step_speed.compare(TINY, [1, 2], length_tokens=16, answer_share=0.5, repetitions=2)
    assert len(found) == 10


@pytest.mark.slow
def test_gmt_step_speed() -> None:
    assert len(gmt_step_speed.compare(TINY, length_tokens=16, repetitions=2)) == 5


@pytest.mark.slow
def test_apply_speed(tmp_path: Path) -> None:
    found = apply_speed.compare(tmp_path, hidden_size=64, layers=2, some=[1], repetitions=1)
    assert len(found) == 17
    for case in ("all layers", "1 of 2 layers"):
        assert int(found[f"apply, {case}, peak bytes"].replace(",", "")) < 1e9


@pytest.mark.slow
def test_delta_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = "random 5 %, int8"
    monkeypatch.setattr(delta_speed, "KINDS", {kind: delta_speed.KINDS[kind]})
    found = delta_speed.compare(tmp_path, hidden_size=64, layers=2, repetitions=1)
    assert len(found) == 1 + 3 * 4 + 1
    assert float(found["random 5 %, int8, share of the checkpoint"].rstrip("%")) < 20


def test_codec_speed() -> None:
    found = codec_speed.compare(500_000, repetitions=2)
    assert len(found) == 27
    for ratio in (0.02, 0.1, 0.4):
        packed, deflate, ans = (
            float(found[f"{codec} at {ratio}, bits a weight / entropy"]) for codec in ("packed", "deflate", "ans")
        )
        assert packed > deflate > ans
        assert 0.999 < ans < 1.002


@pytest.mark.slow
def test_allocator_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert len(allocator_speed.compare("tiny", length_tokens=16, steps=1, repetitions=1)) == 5


@pytest.mark.slow
def test_probe_speed(workspace: Path, tmp_path: Path) -> None:
    training = {"epochs": 2.0, "batch_size": 16}
    data = workspace / "train.jsonl"
    found = probe_speed.compare(
        tmp_path, workspace / "tiny", data, group_size=2, layers="2-3", training=training, repetitions=1
    )
    assert len(found) == 6


@pytest.mark.slow
def test_mask_memory(tmp_path: Path) -> None:
    ways = {"low memory": {"low_memory": True}}
    found = mask_memory.compare(tmp_path, ways, hidden_size=256, layers=8, repetitions=1)
    [low] = (float(text.split(",")[0]) for text in found.values())
    assert 8 < low < 14


def test_listing_speed(tmp_path: Path) -> None:
    found = listing_speed.compare(tmp_path / "runs", runs=12, repetitions=2)
    assert len(found) == 5
    assert found["runs"].startswith("12, ")
    runs, errors = list_runs(tmp_path / "runs")
    assert (len(runs), errors) == (12, [])
    assert all(run.record.status == "finished" for run in runs)


@pytest.mark.slow
def test_data_speed(tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path / "model")
    problems = "".join(json.dumps({"question": f"{n}?", "answer": "1"}) + "\n" for n in range(9))
    (tmp_path / "gsm8k.jsonl.gz").write_bytes(gzip.compress(problems.encode()))
    data_speed.make_records(tmp_path / "gsm8k.jsonl.gz", 20, tmp_path / "data.jsonl")
    ours, trls = (data_speed.run(what, tmp_path / "model", tmp_path / "data.jsonl", 100) for what in ("prepare", "map"))
    assert ours["tokens"] == trls["tokens"] > 20 * 4
    assert min(*ours.values(), trls["wall_seconds"]) >= 0
