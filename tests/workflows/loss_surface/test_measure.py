"""The loss surface: measurements per point, unaffected by interruptions, kills and repeated calls."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mftctl.data.examples import Example
from mftctl.data.prepared.load import load_examples
from mftctl.data.seen_records import seen_records
from mftctl.errors import ConfigError, DataError, Interrupted, ModelError, RunError
from mftctl.experiments.model_source import source_of_run
from mftctl.experiments.recipe_files import load_recipe, with_changes
from mftctl.experiments.run_config import to_document
from mftctl.experiments.run_folder import Run, create_run, load_run
from mftctl.masking.mask import load_mask
from mftctl.progress import Progress, Silence
from mftctl.workflows.apply import apply
from mftctl.workflows.eval import evaluate
from mftctl.workflows.fft import fine_tune
from mftctl.workflows.loss_surface.measure import measure_surface
from mftctl.workflows.mask_train import mask_train
from tests.workflow_fixtures import encode_records, make_recipe, open_run

POINTS, RECORDS = 4, 8
PLACES = 3 + POINTS**2


class Stopper:
    """A listener that presses Ctrl-C after a number of points, and of records of the next point."""

    def __init__(self, points: int, records: int = 0) -> None:
        self.done = points * 2 * RECORDS + records
        self.notes: list[str] = []

    def progress(self, state: Progress) -> None:
        if state.task == "measuring the surface" and state.done == self.done:
            signal.raise_signal(signal.SIGINT)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def family(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder with FFT, continued FFT and MFT. Read-only."""
    root = tmp_path_factory.mktemp("family") / "runs"
    recipe = make_recipe(workspace)
    run, source = open_run(root, "fft", recipe)
    run.finish(fine_tune(recipe, source, run, Silence()))
    source = source_of_run(run)
    for command, work in (("fft", fine_tune), ("mask-train", mask_train)):
        changed = with_changes(recipe, {"model": source.model, "fft.keep": "last", "mask_train.layers": "all"})
        run = create_run(root, command, to_document(changed), inputs=source.as_inputs())
        run.finish(work(changed, source, run, Silence()))
    return root


@pytest.fixture
def root(family: Path, tmp_path: Path) -> Path:
    """A copy of the runs folder, whose records name the models of the original."""
    return Path(shutil.copytree(family, tmp_path / "runs"))


@pytest.fixture(scope="module")
def measured(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished surface run. Read-only."""
    root = Path(shutil.copytree(family, tmp_path_factory.mktemp("measured") / "runs"))
    return measure_surface(root, Silence(), points=POINTS, records=RECORDS)


def in_half_precision(root: Path) -> None:
    """Rewrites all three models in bf16 in several files, the masked one as `apply` writes it."""
    fft, continued, mask = (load_run(root / name) for name in ("001-fft", "002-fft", "003-mask-train"))
    applied = create_run(root, "apply", mask.record.config, inputs=fft.record.inputs)
    applied.finish(apply(source_of_run(mask), applied, Silence()))
    shutil.rmtree(mask.folder)
    for run in (fft, continued, applied):
        old, new = Path(run.record.result["model"]), run.folder / "bf16"
        model = AutoModelForCausalLM.from_pretrained(old, dtype=torch.bfloat16)
        model.save_pretrained(new, max_shard_size="20KB")
        AutoTokenizer.from_pretrained(old).save_pretrained(new)
        assert len(list(new.glob("*.safetensors"))) > 1
        run.update(result={**run.record.result, "model": str(new)})
    for run in (continued, applied):
        run.update(inputs={**run.record.inputs, "model": fft.record.result["model"]})


def state_dict(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def corner_states(root: Path) -> list[dict[str, np.ndarray]]:
    """The weights of the three models, as stored."""
    states = [state_dict(Path(load_run(root / name).record.result["model"])) for name in ("001-fft", "002-fft")]
    if (root / "003-mask-train").exists():
        mask = load_mask(root / "003-mask-train" / "mask.bits")
        reset = state_dict(Path(mask.metadata.base_model)) if mask.metadata.kind == "delta" else {}
        keep = {name: mask[name] if name in mask else torch.ones(()).bool() for name in states[0]}
        zero = torch.zeros(())
        states.append({name: torch.where(keep[name], w, reset.get(name, zero)) for name, w in states[0].items()})
    else:
        states.append(state_dict(Path(load_run(root / "004-apply").record.result["model"])))
    return [{name: tensor.double().numpy() for name, tensor in state.items()} for state in states]


def answer_loss(state: dict[str, np.ndarray], folder: Path, examples: list[Example]) -> float:
    """The loss per answer token, computed one record and one token at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    missing = model.load_state_dict(
        {name: torch.tensor(values).float() for name, values in state.items()}, strict=False
    )
    assert missing.missing_keys == ["lm_head.weight"]
    assert not missing.unexpected_keys
    losses = []
    for record in encode_records(examples, AutoTokenizer.from_pretrained(folder)).records:
        with torch.no_grad():
            logits = model(torch.tensor([list(record.input_ids)])).logits[0].double().log_softmax(-1)
        losses += [-float(logits[i - 1, label]) for i, label in enumerate(record.labels) if label >= 0]
    return float(np.mean(losses))


@pytest.mark.slow
@pytest.mark.parametrize("half_precision", [False, True])
def test_points_equal_the_losses_of_state_dicts_on_the_plane(root: Path, workspace: Path, half_precision: bool) -> None:
    if half_precision:
        in_half_precision(root)
    run = measure_surface(root, Silence(), points=POINTS, records=RECORDS)
    base, continued, masked = corner_states(root)
    flat = [np.concatenate([state[name].ravel() for name in base]) for state in (base, continued, masked)]
    u, towards = flat[1] - flat[0], flat[2] - flat[0]
    v = towards - (towards @ u) / (u @ u) * u
    u, v = u / np.linalg.norm(u), v / np.linalg.norm(v)
    test = load_examples(make_recipe(workspace).test_data)[:RECORDS]
    folder = Path(load_run(root / "001-fft").record.result["model"])
    lines = [line.document() for line in run.training.metrics()]
    assert len(lines) == PLACES
    for line, weights in zip(lines[:3], flat, strict=True):
        away = weights - flat[0]
        assert (line["x"], line["y"]) == pytest.approx((away @ u, away @ v), abs=1e-5)
    for line in (*lines[:3], *lines[3::5]):
        weights = flat[0] + line["x"] * u + line["y"] * v
        state, start = {}, 0
        for name, values in base.items():
            state[name] = weights[start : start + values.size].reshape(values.shape)
            start += values.size
        assert line["test_loss"] == pytest.approx(answer_loss(state, folder, test), abs=1e-5)


@pytest.mark.slow
def test_a_delta_mask_is_a_corner(root: Path, workspace: Path) -> None:
    fft, learned = load_run(root / "001-fft"), load_run(root / "003-mask-train")
    recipe = with_changes(load_recipe(base=learned.record.config, stages=False), {"mask_train.kind": "delta"})
    shutil.rmtree(learned.folder)
    source = source_of_run(fft)
    run = create_run(root, "mask-train", to_document(recipe), inputs=source.as_inputs())
    assert run.name == "003-mask-train"
    run.finish(mask_train(recipe, source, run, Silence()))
    surface = measure_surface(root, Silence(), points=4, records=RECORDS)
    mark = surface.record.result["marks"][2]
    assert mark["mark"] == "MFT delta, paper"
    test = load_examples(make_recipe(workspace).test_data)[:RECORDS]
    state = corner_states(root)[2]
    assert mark["test_loss"] == pytest.approx(answer_loss(state, Path(source.model), test), abs=1e-5)


@pytest.mark.slow
def test_the_three_models_have_the_loss_that_eval_measures(measured: Run, tmp_path: Path) -> None:
    corners = [load_run(measured.folder.parent / name) for name in ("001-fft", "002-fft", "003-mask-train")]
    for run, mark in zip(corners, measured.record.result["marks"], strict=True):
        assert mark["mark"] == run.record.result["state"]
        document = {**run.record.config, "eval": {"limit": RECORDS, "generate": False}}
        recipe = load_recipe(base=document)
        evaluation, _ = open_run(tmp_path, "eval", recipe)
        (dataset,) = evaluate(recipe, source_of_run(run), evaluation, Silence()).document()["datasets"]
        assert dataset["digest"] == measured.record.inputs["digests"]["test"]
        assert dataset["metrics"][0]["value"] == mark["test_loss"]


@pytest.mark.slow
def test_the_grid_has_each_point_once_and_the_three_models_well_inside(measured: Run) -> None:
    lines = [line.document() for line in measured.training.metrics()]
    cells = lines[3:]
    assert [line["step"] for line in lines] == list(range(1, PLACES + 1))
    assert {(line["column"], line["row"]) for line in cells} == {(x, y) for x in range(POINTS) for y in range(POINTS)}
    for axis, index in (("x", "column"), ("y", "row")):
        values = sorted({line[axis] for line in cells})
        assert values == [next(line[axis] for line in cells if line[index] == number) for number in range(POINTS)]
        low, high = min(mark[axis] for mark in lines[:3]), max(mark[axis] for mark in lines[:3])
        assert (low - values[0], values[-1] - high) == pytest.approx(((high - low) / 3, (high - low) / 3))
    lowest = measured.record.result["lowest"]["test_loss"]
    assert lowest["test_loss"] == min(line["test_loss"] for line in cells)


@pytest.mark.slow
def test_the_training_records_are_those_that_fft_saw(measured: Run, workspace: Path) -> None:
    seen = seen_records(measured.folder.parent, ["001-fft"])
    examples = load_examples(make_recipe(workspace).data)
    assert set(seen.tolist()) == set(examples.digests.tolist())
    everything = measure_surface(measured.folder.parent, Silence(), points=POINTS, records=1000)
    assert everything.record.inputs["train_records"] == 48
    assert everything.record.inputs["test_records"] == 16
    assert measured.record.inputs["train_records"] == RECORDS
    (fft, *_) = everything.record.result["marks"]
    folder = Path(load_run(measured.folder.parent / "001-fft").record.result["model"])
    assert fft["train_loss"] == pytest.approx(
        answer_loss(
            corner_states(measured.folder.parent)[0],
            folder,
            list(examples.take(np.unique(examples.digests, return_index=True)[1])),
        ),
        abs=1e-5,
    )


@pytest.mark.slow
@pytest.mark.parametrize("within", [0, RECORDS])
def test_ctrl_c_keeps_every_point_and_the_same_command_resumes(root: Path, measured: Run, within: int) -> None:
    with pytest.raises(Interrupted) as caught:
        measure_surface(root, Stopper(7, within), points=POINTS, records=RECORDS)
    assert caught.value.exit_code == 130
    assert caught.value.message == f"Stopped after 7 of {PLACES} points."
    stopped = load_run(root / "004-surface")
    assert stopped.record.status == "interrupted"
    assert len(stopped.training.metrics()) == 7
    resumed = measure_surface(root, Silence(), points=POINTS, records=RECORDS)
    assert resumed.folder == stopped.folder
    assert_same(resumed, measured)


@pytest.mark.slow
def test_a_killed_run_resumes_after_its_last_complete_line(root: Path, measured: Run) -> None:
    with pytest.raises(Interrupted):
        measure_surface(root, Stopper(9), points=POINTS, records=RECORDS)
    killed = load_run(root / "004-surface")
    log = killed.folder / "metrics.jsonl"
    log.write_text(log.read_text()[:-20])
    killed.update(status="running", worker="another-machine:1")
    listener = Stopper(-1)
    resumed = measure_surface(root, listener, points=POINTS, records=RECORDS)
    assert f"Resuming: {killed.folder}" in listener.notes
    assert_same(resumed, measured)


def assert_same(run: Run, expected: Run) -> None:
    assert (run.folder / "metrics.jsonl").read_bytes() == (expected.folder / "metrics.jsonl").read_bytes()
    results = [dict(one.record.result) for one in (run, expected)]
    for result in results:
        result.pop("peak_memory_bytes")
    assert results[0] == results[1]
    assert run.record.status == "finished"


@pytest.mark.slow
def test_a_second_call_does_nothing_and_a_different_grid_is_a_new_run(root: Path) -> None:
    first = measure_surface(root, Silence(), points=POINTS, records=4)
    before = (first.folder / "run.json").read_bytes()
    listener = Stopper(1)
    second = measure_surface(root, listener, points=POINTS, records=4)
    assert (second.folder, second.record) == (first.folder, first.record)
    assert (first.folder / "run.json").read_bytes() == before
    assert listener.notes[-1] == f"Already measured: {first.folder}"
    assert measure_surface(root, Silence(), points=POINTS, records=5).name == "005-surface"
    assert measure_surface(root, Silence(), points=POINTS + 1, records=4).name == "006-surface"


@pytest.mark.slow
def test_a_newer_mask_is_measured_in_a_new_run(root: Path) -> None:
    first = measure_surface(root, Silence(), points=POINTS, records=2)
    newer = Path(shutil.copytree(root / "003-mask-train", root / "009-mask-train"))
    run = load_run(newer)
    run.update(result={**run.record.result, "best_loss": -9.0})
    second = measure_surface(root, Silence(), points=POINTS, records=2)
    assert second.name == "010-surface"
    assert [corner["run"] for corner in second.record.inputs["corners"]] == ["001-fft", "002-fft", "009-mask-train"]
    assert first.record.status == "finished"


def test_without_all_three_models_no_run_is_created(root: Path) -> None:
    shutil.rmtree(root / "002-fft")
    with pytest.raises(RunError, match=r"No continued FFT starts from 001-fft\."):
        measure_surface(root, Silence(), points=POINTS, records=RECORDS)
    assert not list(root.glob("*-surface"))


@pytest.mark.slow
def test_changed_training_data_is_refused(root: Path, tmp_path: Path, workspace: Path) -> None:
    fft = load_run(root / "001-fft")
    shorter = tmp_path / "shorter.jsonl"
    shorter.write_text("".join((workspace / "train.jsonl").read_text().splitlines(keepends=True)[:40]))
    fft.update(config={**fft.record.config, "data": [str(shorter)]})
    with pytest.raises(DataError) as caught:
        measure_surface(root, Silence(), points=POINTS, records=RECORDS)
    assert caught.value.message == "The training data has changed since 001-fft was trained."
    assert str(caught.value.expected).startswith("48 records with SHA-256 ")
    assert str(caught.value.actual).startswith("40 records with SHA-256 ")


@pytest.mark.slow
def test_a_continued_fft_that_changed_nothing_fails_and_says_so(root: Path) -> None:
    continued = load_run(root / "002-fft")
    copy = shutil.copytree(load_run(root / "001-fft").record.result["model"], root / "002-fft" / "copy")
    continued.update(result={**continued.record.result, "model": str(copy)})
    with pytest.raises(ModelError, match="The first two of the three models have the same weights"):
        measure_surface(root, Silence(), points=POINTS, records=RECORDS)
    assert load_run(root / "004-surface").record.status == "failed"


def test_an_adapter_is_refused(root: Path) -> None:
    continued = load_run(root / "002-fft")
    adapter = root / "002-fft" / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    continued.update(result={**continued.record.result, "model": str(adapter)})
    with pytest.raises(ModelError, match="holds an adapter, but a whole model is needed"):
        measure_surface(root, Silence(), points=POINTS, records=RECORDS)


@pytest.mark.parametrize(
    ("points", "records", "key", "fewest"), [(3, 8, "--surface-points", 4), (4, 0, "--surface-records", 1)]
)
def test_a_grid_or_a_subset_that_is_too_small_is_refused(
    root: Path, points: int, records: int, key: str, fewest: int
) -> None:
    with pytest.raises(ConfigError) as caught:
        measure_surface(root, Silence(), points=points, records=records)
    assert (caught.value.key, caught.value.expected) == (key, f"at least {fewest}")


def test_the_log_is_plain_json(measured: Run) -> None:
    for line in (measured.folder / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=pytest.fail)
