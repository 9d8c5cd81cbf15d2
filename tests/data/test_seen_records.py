"""Selection of the records that a mask is learned from."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mftctl.data.examples import Example, Message
from mftctl.data.seen_records import records_to_learn_from, save_seen, seen_records
from mftctl.errors import DataError, RunError
from mftctl.experiments.model_source import source_of_run
from mftctl.experiments.run_folder import create_run
from mftctl.progress import Silence
from mftctl.workflows.fft import fine_tune
from mftctl.workflows.mask_train import mask_train
from mftctl.workflows.probe import probe
from mftctl.workflows.validate import validate
from tests.data.prepared_examples import prepared
from tests.workflow_fixtures import Interrupter, make_recipe, open_run, write_additions


def example(number: int) -> Example:
    return Example("chat", (Message("user", f"{number}?"), Message("assistant", "1")), f"train.jsonl:{number}")


EXAMPLES = [example(number) for number in range(100)]
PREPARED = prepared(EXAMPLES)


@pytest.mark.slow
@given(st.sets(st.integers(0, 99)))
def test_unseen_records_are_all_but_the_seen_in_their_order(seen: set[int]) -> None:
    digests = PREPARED.take(sorted(seen)).digests
    unseen = [item for number, item in enumerate(EXAMPLES) if number not in seen]
    assert list(records_to_learn_from(PREPARED, digests, "all")) == EXAMPLES
    assert list(records_to_learn_from(PREPARED, digests, "auto")) == (unseen if len(unseen) >= 64 else EXAMPLES)
    if unseen:
        assert list(records_to_learn_from(PREPARED, digests, "unseen")) == unseen


def test_learning_from_unseen_records_needs_some() -> None:
    with pytest.raises(DataError) as caught:
        records_to_learn_from(PREPARED[:3], PREPARED.digests, "unseen")
    assert caught.value.actual == "3 training records, all used in fine-tuning"
    assert caught.value.hint == "give different data with --data, or use --learn-from all"


def test_a_digest_depends_on_the_content_alone() -> None:
    moved = prepared([Example("chat", EXAMPLES[0].messages, "elsewhere.jsonl:7")])
    assert moved.digests[0] == PREPARED.digests[0] != PREPARED.digests[1]
    content = b'["chat", [["user", "0?"], ["assistant", "1"]]]'
    assert moved.digests[0] == int(hashlib.sha256(content).hexdigest()[:16], 16)


def test_seen_records_of_several_runs_are_joined(tmp_path: Path) -> None:
    for name, part in (("001-fft", PREPARED[:2]), ("002-fft", PREPARED[1:4])):
        (tmp_path / name).mkdir()
        save_seen(tmp_path / name, part.digests)
    (tmp_path / "003-apply").mkdir()
    found = seen_records(tmp_path, ["001-fft", "002-fft", "003-apply", "gone"])
    assert set(found.tolist()) == set(PREPARED[:4].digests.tolist())
    assert (tmp_path / "001-fft" / "records.bin").stat().st_size == 16


def test_records_of_an_older_run_are_read(tmp_path: Path) -> None:
    (tmp_path / "001-fft").mkdir()
    lines = "".join(f"{digest:016x}\n" for digest in PREPARED[:3].digests.tolist())
    (tmp_path / "001-fft" / "records.txt").write_text(lines, encoding="utf-8")
    assert set(seen_records(tmp_path, ["001-fft"]).tolist()) == set(PREPARED[:3].digests.tolist())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("records.bin", b"\0" * 7),
        ("records.txt", b"12g4\n"),
        ("records.txt", b"1_1\n"),
        ("records.txt", b"-1\n"),
        ("records.txt", b"1" * 20),
    ],
)
def test_damaged_digests_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / "001-fft").mkdir()
    (tmp_path / "001-fft" / name).write_bytes(content)
    with pytest.raises(RunError, match="damaged") as caught:
        seen_records(tmp_path, ["001-fft"])
    assert caught.value.path == str(tmp_path / "001-fft" / name)


@pytest.mark.slow
def test_a_mask_is_learned_from_records_held_back_in_fine_tuning(workspace: Path, tmp_path: Path) -> None:
    """Fine-tuning sees half of 160 records; mask and probe get the rest, or all with the paper's settings."""
    data = str(write_additions(tmp_path / "more.jsonl", 160, seed=5))
    changes = {"data": [data], "fft__data_fraction": 0.5, "fft__max_steps": 2, "mask_train__max_steps": 2}
    recipe = make_recipe(workspace, **changes, mask_train__preset="default")
    run, source = open_run(tmp_path / "runs", "fft", recipe)
    run.finish(fine_tune(recipe, source, run, Silence()))
    tuned = source_of_run(run)
    seen = seen_records(tmp_path / "runs", tuned.parents)

    masking = create_run(tmp_path / "runs", "mask-train", {}, inputs=tuned.as_inputs())
    listener = Interrupter(-1)
    mask_train(recipe, tuned, masking, listener)
    left = masking.record.inputs["train_records"]
    assert left >= 64
    assert left + run.record.inputs["train_records"] <= 160  # a few additions occur twice and count as seen
    assert any(
        f"Training records: {left}; left out because fine-tuning used them: {160 - left} " in note
        for note in listener.notes
    )
    assert masking.record.inputs["fft_learning_rate"] == recipe.fft.learning_rate
    assert any("4 times that of fine-tuning (0.003)" in note for note in listener.notes)
    assert len(seen) <= 80

    probing = create_run(tmp_path / "runs", "probe", {}, inputs=tuned.as_inputs())
    probe(recipe, tuned, probing, Silence())
    assert probing.record.inputs["train_records"] == int(left * 0.5 + 0.5)

    stages = {name: {"command": name, "after": "fft"} for name in ("probe", "mask-train")}
    planned = validate(
        make_recipe(workspace, **changes, mask_train__preset="default", stages={"fft": {"command": "fft"}, **stages}),
        None,
    )
    records = {stage.stage: stage.records for stage in planned.stages}
    assert records == {"fft": 80, "probe": int(left * 0.5 + 0.5), "mask-train": left}

    whole = create_run(tmp_path / "runs", "mask-train", {}, inputs=tuned.as_inputs())
    paper = make_recipe(workspace, **changes)
    mask_train(paper, tuned, whole, Silence())
    assert whole.record.inputs["train_records"] == 160
