"""Averages as runs: their record, their result and their place in a lineage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mftctl.data.seen_records import save_seen, seen_records
from mftctl.errors import ConfigError, ModelError
from mftctl.experiments.combined_results import AverageResult
from mftctl.experiments.model_origin import told_origin
from mftctl.experiments.model_source import ModelSource, ancestry, source_of_model, source_of_run
from mftctl.experiments.run_folder import Run, create_run
from mftctl.experiments.run_inputs import AveragedCheckpoints
from mftctl.experiments.state_names import AVERAGED, FFT
from mftctl.progress import Progress, Silence
from mftctl.workflows.average import average
from tests.masking.built_checkpoints import raw_tensors, write_tuned
from tests.partial_results import partial_result


def fft_run(root: Path, base: Path, seed: int) -> ModelSource:
    """A finished `fft` run with a model of its own, that has seen the record `seed`."""
    inputs = ModelSource(str(base)).as_inputs()
    run = create_run(root, "fft", {"seed": seed, "data": ["train.jsonl"]}, inputs=inputs)
    model = write_tuned(base, run.folder / "model", seed=seed)
    save_seen(run.folder, np.array([seed], np.uint64))
    run.finish(partial_result({"state": FFT, "model": str(model)}))
    return source_of_run(run)


@pytest.fixture
def sources(tiny_checkpoint: Path, tmp_path: Path) -> list[ModelSource]:
    """Two fine-tuned models in `runs`."""
    return [fft_run(tmp_path / "runs", tiny_checkpoint, seed) for seed in (1, 2)]


def average_of(root: Path, sources: list[ModelSource], weights: list[float] | None = None) -> tuple[Run, AverageResult]:
    run = create_run(root, "average", {}, inputs=sources[0].as_inputs())
    run.finish(average(sources, weights, run, Silence()))
    return run, run.result(AverageResult)


def test_the_result_names_the_model_and_the_settled_weights(sources: list[ModelSource], tmp_path: Path) -> None:
    run, result = average_of(tmp_path / "runs", sources, [3, 1])
    assert (result.state, result.model, result.weights) == (AVERAGED, str(run.folder / "model"), [0.75, 0.25])
    size_bytes = sum(path.stat().st_size for path in (run.folder / "model").iterdir())
    assert result.bytes_written == size_bytes
    names = raw_tensors(Path(sources[0].model) / "model.safetensors").keys()
    assert raw_tensors(run.folder / "model" / "model.safetensors").keys() == names
    assert result.tensors_averaged == len(names)
    given = AveragedCheckpoints.read(run.record.inputs)
    assert (given.checkpoints, given.weights) == ([source.model for source in sources], [3.0, 1.0])


def test_weights_are_equal_by_default(sources: list[ModelSource], tmp_path: Path) -> None:
    run, result = average_of(tmp_path / "runs", sources)
    assert result.weights == [0.5, 0.5]
    assert AveragedCheckpoints.read(run.record.inputs).weights is None


def test_all_parents_count(sources: list[ModelSource], tiny_checkpoint: Path, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    run, result = average_of(root, sources)
    made = source_of_model(result.model, root)
    assert made == source_of_run(run)
    assert (made.state, made.parents) == (AVERAGED, ("001-fft", "002-fft", "003-average"))
    assert made.origin == str(tiny_checkpoint)
    assert seen_records(root, made.parents).tolist() == [1, 2]
    assert [state.state for state in ancestry(root, made)] == ["pre-trained", FFT, AVERAGED]


def test_an_average_of_averages_counts_each_parent_once(sources: list[ModelSource], tmp_path: Path) -> None:
    root = tmp_path / "runs"
    first = source_of_run(average_of(root, sources)[0])
    run, _ = average_of(root, [first, sources[0]])
    assert source_of_run(run).parents == ("001-fft", "002-fft", "003-average", "004-average")


def test_the_folder_itself_tells_its_origin(sources: list[ModelSource], tiny_checkpoint: Path, tmp_path: Path) -> None:
    _, result = average_of(tmp_path / "runs", sources)
    told = told_origin(Path(result.model))
    assert told is not None
    assert (told.state, told.base, told.origin) == (AVERAGED, sources[0].model, str(tiny_checkpoint))
    elsewhere = source_of_model(result.model, tmp_path / "no runs")
    assert (elsewhere.state, elsewhere.base) == (AVERAGED, sources[0].model)


def test_the_output_of_the_run_gets_the_model(sources: list[ModelSource], tmp_path: Path) -> None:
    run = create_run(tmp_path / "runs", "average", {}, inputs=sources[0].as_inputs(), output=tmp_path / "out")
    assert average(sources, None, run, Silence()).model == str(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_progress_is_reported(sources: list[ModelSource], tmp_path: Path) -> None:
    told: list[Progress] = []

    class Listening(Silence):
        def progress(self, state: Progress) -> None:
            told.append(state)

    run = create_run(tmp_path / "runs", "average", {}, inputs=sources[0].as_inputs())
    average(sources, None, run, Listening())
    assert {state.task for state in told} == {"writing"}
    assert told[-1].done == told[-1].total


def test_one_checkpoint_is_refused(sources: list[ModelSource], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least two checkpoints"):
        average_of(tmp_path / "runs", sources[:1])


def test_an_adapter_is_refused(sources: list[ModelSource], tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds an adapter") as caught:
        average_of(tmp_path / "runs", [sources[0], ModelSource(str(adapter))])
    assert caught.value.path == str(adapter)
