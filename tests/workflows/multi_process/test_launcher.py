"""Commands that start two processes on a CPU: results, messages and interruption as with one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import psutil
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.models.utils import Collator

from mftctl import load_mask
from mftctl.errors import ConfigError, DataError
from mftctl.evaluation.lm.base import likelihood_batches
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.recipe_files import load_recipe, parse_recipe
from mftctl.experiments.results import ApplyResult
from mftctl.experiments.run_config import to_document
from mftctl.experiments.run_folder import Run, list_runs
from mftctl.progress import Progress
from mftctl.workflows.multi_process import launcher, process_count
from mftctl.workflows.multi_process.dispatch import launch_of
from mftctl.workflows.multi_process.messages import Hearing, Speaker
from mftctl.workflows.multi_process.process_count import Launch, Shard, require_devices, settle_launch
from mftctl.workflows.run import plan_experiment
from tests.cli.running import CommandLine
from tests.evaluation.benchmarks.test_measure import FUNCTIONS, write
from tests.workflow_fixtures import make_recipe, write_additions

TOGETHER = ("--processes", "2")
CHOICES = ["1", "2", "3", "4"]
MMLU = [
    {"question": f"{n}+1?" + " " * (n % 3), "choices": CHOICES, "answer": n % 4, "subject": "sums"} for n in range(7)
]
SUMS = [{"question": f"{n}+1?", "answer": f"#### {n + 1}"} for n in range(5)]


@pytest.fixture
def mftctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(tmp_path, monkeypatch, capsys)


@pytest.mark.slow
def test_an_evaluation_equals_that_of_one_process(mftctl: CommandLine, workspace: Path, tmp_path: Path) -> None:
    """More than one batch of each kind: losses, greedy answers, likelihoods, and sampled programs, which are run."""
    files = {
        "gsm8k_0shot": write(tmp_path / "sums.jsonl", SUMS),
        "mmlu": write(tmp_path / "mmlu.jsonl", MMLU),
        "humaneval": write(tmp_path / "functions.jsonl", FUNCTIONS),
    }
    given = [option for task, file in files.items() for option in ("--task-data", f"{task}={file}")]
    measured = ("--data", write_additions(tmp_path / "test.jsonl", 150, seed=4), "--tasks", ",".join(files), *given)
    settings = ("--batch-size", 2, "--max-new-tokens", 8, "--temperature", 1.0, "--unsafe-code", "--again", "--json")
    results = []
    for option in ((), TOGETHER):
        outcome = mftctl("eval", workspace / "tiny", *measured, *settings, *option)
        assert outcome.code == 0, outcome.stderr
        results.append(json.loads(outcome.stdout))
    alone, together = results
    for mine, its in zip(together["datasets"], alone["datasets"], strict=True):
        assert {**mine, "seconds": 0} == {**its, "seconds": 0}
        folders = (Path(result["run"]) for result in (together, alone))
        rows, expected = ((tmp_path / folder / mine["samples"]).read_text() for folder in folders)
        assert rows == expected
    drawn = [json.loads(line)["output"] for line in rows.splitlines()]  # from humaneval, the last benchmark
    assert len(set(drawn)) > 1
    one, two = list_runs(tmp_path / "runs")[0]
    assert (one.record.processes, two.record.processes, two.record.status) == (1, 2, "finished")
    assert not (two.folder / "logs").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("forked_workers")
def test_an_experiment_resumes_after_ctrl_c(mftctl: CommandLine, workspace: Path, tmp_path: Path) -> None:
    """An interrupted probe and the mask of its recommended layers end as with one process."""
    alone = finished(mftctl, experiment(workspace, tmp_path / "alone.yaml", grad_accum_steps=2), "--runs", "alone")
    command = ("run", experiment(workspace, tmp_path / "together.yaml", grad_accum_steps=1), *TOGETHER)

    def press_ctrl_c() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with once(press_ctrl_c, (tmp_path / "runs" / "001-probe" / "groups" / "0-1" / CHECKPOINT).exists):
        outcome = mftctl(*command)
    assert (outcome.code, outcome.stdout) == (130, "")
    assert outcome.stderr.count("Error:") == 1
    assert "of 12; the state is saved" in outcome.stderr
    assert "try: the same mftctl run command resumes it" in outcome.stderr
    assert outcome.stderr.count("Stopping after this step") == 1
    assert list_runs(tmp_path / "runs")[0][0].record.status == "interrupted"

    together = finished(mftctl, *command[1:])
    for mine, its in zip(together, alone, strict=True):
        assert mine.record.processes == 2
        assert mine.record.result.keys() == its.record.result.keys()
    groups, expected = (runs[0].record.result["groups"] for runs in (together, alone))
    assert [group["layers"] for group in groups] == [group["layers"] for group in expected]
    for found, wanted in zip(groups, expected, strict=True):
        assert {**found, "layers": ""} == pytest.approx({**wanted, "layers": ""}, abs=1e-6)
    mask, its_mask = (load_mask(runs[1].folder / "mask.bits") for runs in (together, alone))
    assert all(torch.equal(mask[name], its_mask[name]) for name in its_mask.names())


@pytest.mark.slow
def test_a_lost_process_ends_the_others(mftctl: CommandLine, workspace: Path, tmp_path: Path) -> None:
    """It is killed before it joins the others, so that they wait for it."""

    def is_started() -> bool:
        return any(True for _ in workers(1))

    def kill_second() -> None:
        next(workers(1)).kill()

    data = ("-d", workspace / "train.jsonl", "--val-data", workspace / "val.jsonl")
    with once(kill_second, is_started):
        outcome = mftctl("mask-train", "-m", workspace / "tiny", *data, "--layers", "1", *TOGETHER, "--json")
    assert (outcome.code, outcome.stdout) == (1, "")
    assert outcome.stderr.count("Error:") == 1
    assert "A process ended before its work was done" in outcome.stderr
    assert "process 2 of 2: killed by SIGKILL" in outcome.stderr
    assert "mftctl mask-train --resume --processes 2 resumes it" in outcome.stderr
    assert not any(True for _ in workers(0))
    (run,) = list_runs(tmp_path / "runs")[0]
    assert (run.record.status, run.record.processes) == ("interrupted", 2)
    assert (run.folder / "logs" / "process-2.txt").is_file()


@pytest.mark.slow
def test_a_process_that_ends_before_its_order_ends_the_others(
    mftctl: CommandLine, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start_and_wait(environment: Mapping[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]:
        process = start(environment, log)
        process.wait()
        return process

    start = launcher._start
    monkeypatch.setattr(launcher, "_start", start_and_wait)
    monkeypatch.setattr(launcher, "_PROGRAM", "raise SystemExit(3)")
    data = ("-d", workspace / "train.jsonl", "--val-data", workspace / "val.jsonl")
    outcome = mftctl("mask-train", "-m", workspace / "tiny", *data, "--layers", "1", *TOGETHER)
    assert outcome.code == 1
    assert "A process ended before its work was done" in outcome.stderr
    assert "process 1 of 2: exit code 3" in outcome.stderr


CHECKPOINT = Path("checkpoints") / "checkpoint-4" / "trainer_state.json"


def experiment(workspace: Path, path: Path, **training: Any) -> Path:
    """A recipe with a probe and a mask training."""
    document = to_document(make_recipe(workspace, probe__data_fraction=1.0, mask_train__layers=None))
    document["mask_train"] |= training
    document["stages"] = {"probe": {"command": "probe"}, "mft": {"command": "mask-train", "layers_from": "probe"}}
    path.write_text(yaml.safe_dump(document))
    return path


def finished(mftctl: CommandLine, *arguments: object) -> list[Run]:
    """The runs of an experiment, which must succeed."""
    outcome = mftctl("run", *arguments)
    assert outcome.code == 0, outcome.stderr
    root = arguments[arguments.index("--runs") + 1] if "--runs" in arguments else "runs"
    return list_runs(mftctl.folder / str(root))[0]


@contextmanager
def once(act: Callable[[], None], is_time: Callable[[], bool]) -> Iterator[None]:
    """Performs an action from another thread once a condition holds."""

    def watch() -> None:
        while not is_time():
            if ended.wait(0.01):
                return
        act()

    ended = threading.Event()
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def workers(rank: int) -> Iterator[psutil.Process]:
    """The processes of a rank started by this process."""
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if child.environ().get("RANK") == str(rank):
                yield child


# Tests that need no second process


def test_launch_settings_follow_from_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settle_launch("run", None, None) == Launch() == settle_launch("run", 1, None)
    assert settle_launch("run", None, None).words == ()
    assert settle_launch("run", 3, Shard.ZERO2).words == ("--processes", "3", "--shard", "zero2")
    assert settle_launch("eval", 3, None).words == ("--processes", "3")


@pytest.mark.parametrize(
    ("command", "processes", "shard", "message"),
    [
        ("fft", None, Shard.ZERO3, "needs several processes"),
        ("eval", 2, Shard.ZERO3, "cannot shard the model"),
    ],
)
def test_impossible_launches(command: str, processes: int | None, shard: Shard, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settle_launch(command, processes, shard)


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    require_devices(Launch(2, Shard.FSDP2), "auto")
    require_devices(Launch(3), "cpu")
    with pytest.raises(ConfigError, match="its own GPU") as caught:
        require_devices(Launch(3), "cuda")
    assert (caught.value.expected, caught.value.actual) == ("at most 2", 3)


def test_one_gpu_for_several_processes() -> None:
    with pytest.raises(ConfigError, match="its own GPU") as caught:
        require_devices(Launch(2), "cuda:1")
    assert (caught.value.key, caught.value.actual) == ("--device", "cuda:1")


def test_fsdp_without_a_gpu() -> None:
    with pytest.raises(ConfigError, match="only on GPUs"):
        require_devices(Launch(2, Shard.FSDP2), "cpu")


def test_zero_without_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_count, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="not installed") as caught:
        settle_launch("fft", 2, Shard.ZERO2)
    assert "pip install 'mftctl[deepspeed]'" in str(caught.value.hint)


def test_processes_that_accelerate_has_started_start_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="have already been started"):
        settle_launch("fft", 2, None)


def test_stages_of_an_experiment_that_cannot_be_distributed_use_one_process() -> None:
    many = Launch(4, Shard.ZERO3)
    drops = parse_recipe({"mask_train": {"method": "drop"}})
    written = parse_recipe({"eval": {"predictions": "written.jsonl", "tasks": ["humaneval"]}})
    assert launch_of("fft", Recipe(), many) == launch_of("mask-train", Recipe(), many) == many
    assert launch_of("eval", Recipe(), many) == Launch(4)
    for command, recipe in (("apply", Recipe()), ("mask-train", drops), ("eval", written)):
        assert launch_of(command, recipe, many) == Launch()


def test_with_a_batch_size_per_process_their_number_is_a_deciding_key(workspace: Path, tmp_path: Path) -> None:
    """Twice as many processes make steps twice as large."""
    recipe = load_recipe(str(experiment(workspace, tmp_path / "recipe.yaml")))
    digests = {
        number: [planned.digest for planned in plan_experiment(recipe, "x", tmp_path, Launch(number))]
        for number in (1, 2)
    }
    assert digests[1] == [planned.digest for planned in plan_experiment(recipe, "x", tmp_path)]
    assert not set(digests[1]) & set(digests[2])


def test_messages_of_a_process_are_received_however_they_are_split() -> None:
    said, heard = Listened(), Listened()
    reader, writer = os.pipe()
    speaker = Speaker(writer, tells=True)
    for listener in (speaker, said):
        listener.note("a note\nof two lines")
        listener.warn("ö")
        listener.progress(Progress("training", 1, 2, 0.5, 10.0))
    result = ApplyResult(state="MFT", model="m", base="b", bytes_written=1, tensors_masked=2, removed=3)
    speaker.result("apply", result)
    speaker.error(DataError("bad", path="x", hint="y"))
    Speaker(writer, tells=False).note("another process says this too")
    os.close(writer)
    hearing = Hearing(heard)
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        while piece := pipe.read(7):
            hearing.take(piece)
    assert heard.heard == said.heard
    assert hearing.result == result
    assert isinstance(hearing.error, DataError)
    assert (hearing.error.path, hearing.error.hint) == ("x", "y")


class Listened:
    """A listener that records all messages."""

    def __init__(self) -> None:
        self.heard: list[object] = []

    def progress(self, state: Progress) -> None:
        self.heard.append(state)

    def note(self, text: str) -> None:
        self.heard.append(text)

    def warn(self, text: str) -> None:
        self.heard.append(("warning", text))


@pytest.mark.slow
@given(
    texts=st.lists(
        st.tuples(
            st.lists(st.integers(0, 2), min_size=1, max_size=4), st.lists(st.integers(0, 2), min_size=1, max_size=2)
        )
    ),
    size=st.integers(1, 3),
    shares=st.integers(1, 3),
)
def test_shares_of_likelihoods_keep_the_batches_of_lm_eval(
    texts: list[tuple[list[int], list[int]]], size: int, shares: int
) -> None:
    def batches_of(indices: Sequence[int]) -> list[list[int]]:
        requests = [(index, *texts[index]) for index in indices]
        collator = Collator(
            requests,
            sort_fn=lambda request: (-len(request[1] + request[2]), tuple(request[1] + request[2])),
            group_by="contexts",
            group_fn=lambda request: request[1] + request[2][:-1],
        )
        return [[request[0] for request in batch] for batch in collator.get_batched(n=size)]

    batches = likelihood_batches(texts, size)
    assert sorted(index for batch in batches for index in batch) == list(range(len(texts)))
    found = []
    for share in range(shares):
        found += batches_of(sorted(index for batch in batches[share::shares] for index in batch))
    assert sorted(found) == sorted(batches_of(range(len(texts))))
