from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mftctl.errors import ConfigError, RunError
from mftctl.experiments.fft_options import FftOptions
from mftctl.experiments.mask_train_options import MaskTrainOptions
from mftctl.experiments.model_source import (
    ModelSource,
    Recommendation,
    ancestry,
    combined_source,
    fft_learning_rate,
    known_base,
    model_for_training,
    newest_source,
    recommended_layers,
    source_of_mask,
    source_of_model,
    source_of_run,
)
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.run_config import to_document
from mftctl.experiments.run_folder import Run, create_run
from mftctl.experiments.state_names import CONTINUED_FFT, FFT, PRE_TRAINED, fine_tuned_state, mask_state
from tests.partial_results import partial_result


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def run_fft(root: Path, source: ModelSource, output: str | None = None) -> Run:
    """A finished `fft` run, as the command records it."""
    run = create_run(root, "fft", {"seed": 3}, inputs=source.as_inputs())
    folder = Path(output) if output else run.folder / "model"
    folder.mkdir(exist_ok=True)
    run.finish(partial_result({"state": fine_tuned_state(source.state, FftOptions()), "model": str(folder.resolve())}))
    return run


def run_mask(root: Path, source: ModelSource, method: Any = "learned", output: Path | None = None) -> Run:
    """A finished `mask-train` run, as the command records it."""
    run = create_run(root, "mask-train", {"seed": 3}, inputs=source.as_inputs(), output=output)
    run.finish(
        partial_result(
            {
                "state": mask_state(MaskTrainOptions(method=method)),
                "model": source.model,
                "mask": str((run.folder / "mask.bits").resolve()),
                "output": run.record.output,
            }
        )
    )
    return run


def run_apply(root: Path, source: ModelSource) -> Run:
    """A finished `apply` run, as the command records it."""
    run = create_run(root, "apply", {"seed": 3}, inputs=source.as_inputs())
    (run.folder / "model").mkdir()
    run.finish(partial_result({"state": source.state, "model": str((run.folder / "model").resolve())}))
    return run


def run_probe(root: Path, model: str, layers: str) -> Run:
    run = create_run(root, "probe", {}, inputs=ModelSource(model).as_inputs())
    run.finish(partial_result({"recommended_layers": layers}))
    return run


# Models and masks made by runs


def test_model_without_a_run_is_pre_trained(root: Path) -> None:
    assert source_of_model("owner/name", root) == ModelSource("owner/name")
    assert ModelSource("owner/name").as_inputs() == {
        "model": "owner/name",
        "mask": None,
        "state": PRE_TRAINED,
        "parents": [],
        "origin": "owner/name",
    }


def test_model_of_an_fft_run_comes_from_it(root: Path) -> None:
    run = run_fft(root, ModelSource("base"))
    made = source_of_run(run)
    assert made == ModelSource(str(run.folder / "model"), None, FFT, ("001-fft",), "base", {"seed": 3})
    assert source_of_model("runs/001-fft/model", root) == made


def test_mask_of_a_model_does_not_change_the_models_state(root: Path) -> None:
    fft = source_of_run(run_fft(root, ModelSource("base")))
    run_mask(root, fft)
    assert source_of_model(fft.model, root) == fft


def test_masked_pre_trained_folder_stays_pre_trained(root: Path, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    run_mask(root, ModelSource("base"))
    assert source_of_model("base", root) == ModelSource("base")


def test_folder_written_twice_comes_from_the_newest_run(root: Path) -> None:
    first = source_of_run(run_fft(root, ModelSource("base"), "tuned"))
    run_fft(root, first, "tuned")
    found = source_of_model("tuned", root)
    assert (found.state, found.parents) == (CONTINUED_FFT, ("001-fft", "002-fft"))


def test_applied_checkpoint_comes_from_mask_and_apply(root: Path) -> None:
    fft = source_of_run(run_fft(root, ModelSource("base")))
    masked = source_of_run(run_mask(root, fft))
    applied = source_of_run(run_apply(root, masked))
    assert applied == replace(
        masked, model=str(root / "003-apply" / "model"), mask=None, parents=("001-fft", "002-mask-train", "003-apply")
    )
    assert applied.state == "MFT"
    assert source_of_model(applied.model, root) == applied


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "state"),
    [("learned", "MFT"), ("random", "random mask"), ("magnitude", "L1 mask"), ("drop", "trivial drop")],
)
def test_mask_is_recognised_by_the_copy_in_its_run_and_by_the_users_copy(root: Path, method: str, state: str) -> None:
    fft = source_of_run(run_fft(root, ModelSource("base")))
    run = run_mask(root, fft, method, output=Path("mask.bits"))
    for copy in ("runs/002-mask-train/mask.bits", "mask.bits", str(run.folder / "mask.bits")):
        assert source_of_mask(fft.model, copy, root) == ModelSource(
            fft.model, copy, state, ("001-fft", "002-mask-train"), "base", {"seed": 3}
        )


def test_excluded_entries_are_in_the_name_of_the_state() -> None:
    names = [
        fine_tuned_state(ModelSource("m").state, FftOptions(method=method, scope=scope, exclude=exclude))
        for method, scope, exclude in (
            ("gmt", "tensor", ()),
            ("gmt", "global", ("head", "embeddings")),
            ("random", "tensor", ("head",)),
        )
    ]
    assert names == ["GMT", "GMT global excluding embeddings, head", "random update excluding head"]


@pytest.mark.parametrize(
    ("preset", "state"), [("default", "MFT"), ("paper", "MFT, paper"), ("reference", "MFT, reference")]
)
def test_a_preset_is_in_the_name_of_the_state(preset: str, state: str) -> None:
    assert mask_state(MaskTrainOptions.model_validate({"preset": preset})) == state


def test_a_mask_of_rows_has_a_separate_name() -> None:
    assert mask_state(MaskTrainOptions(method="magnitude", unit="row")) == "L1 row mask"
    assert mask_state(MaskTrainOptions(method="magnitude", unit="weight")) == "L1 mask"


def test_mask_file_written_twice_is_of_the_newest_run(root: Path) -> None:
    for method in ("learned", "random"):
        run_mask(root, ModelSource("base"), method, output=Path("mask.bits"))
    assert source_of_mask("base", "mask.bits", root).state == "random mask"
    assert source_of_mask("base", "runs/001-mask-train/mask.bits", root).state == "MFT"


def test_mask_without_a_run_is_simply_masked(root: Path) -> None:
    fft = source_of_run(run_fft(root, ModelSource("base")))
    found = source_of_mask(fft.model, "elsewhere.bits", root)
    assert found == replace(fft, mask="elsewhere.bits", state="masked")
    assert source_of_mask("base", "elsewhere.bits", root) == ModelSource("base", "elsewhere.bits", "masked")


# Fallbacks of bare commands


@pytest.mark.slow
@pytest.mark.parametrize("command", ["fft", "probe", "mask-train"])
def test_bare_command_continues_with_the_newest_fine_tuned_model(root: Path, command: str) -> None:
    first = source_of_run(run_fft(root, ModelSource("base")))
    newest = source_of_run(run_fft(root, first))
    run_mask(root, newest)
    create_run(root, "fft", {})
    assert model_for_training(None, root, command) == newest


def test_bare_fft_without_a_run_starts_from_the_built_in_model(root: Path) -> None:
    assert model_for_training(None, root, "fft") == ModelSource("quickstart")


@pytest.mark.parametrize("command", ["probe", "mask-train"])
def test_bare_command_without_a_run_is_a_config_error(root: Path, command: str) -> None:
    create_run(root, "fft", {})
    with pytest.raises(ConfigError, match=f"{command} needs a model") as caught:
        model_for_training(None, root, command)
    assert caught.value.key == "--model"


def test_given_model_comes_before_any_run(root: Path) -> None:
    run_fft(root, ModelSource("base"))
    assert model_for_training("other", root, "mask-train") == ModelSource("other")


def test_newest_source_is_of_the_newest_run_of_any_of_the_commands(root: Path) -> None:
    assert newest_source(root, "fft", "mask-train") is None
    fft = source_of_run(run_fft(root, ModelSource("base")))
    masked = source_of_run(run_mask(root, fft))
    assert newest_source(root, "fft", "mask-train") == masked
    assert newest_source(root, "fft") == fft
    assert newest_source(root, "apply") is None


@pytest.mark.parametrize(
    ("options", "state"),
    [
        ({}, FFT),
        ({"method": "lora"}, "LoRA"),
        ({"method": "shira"}, "SHiRA"),
        ({"method": "supertuning"}, "Super-Tuning"),
        ({"method": "supertuning", "support": "mask.bits"}, "Super-Tuning on a mask"),
        ({"method": "gmt"}, "GMT"),
        ({"method": "gmt", "scope": "global"}, "GMT global"),
        ({"method": "random"}, "random update"),
        ({"method": "hft"}, "HFT"),
    ],
)
def test_fine_tuning_a_fine_tuned_model_continues(options: dict[str, Any], state: str) -> None:
    method = FftOptions(**options)
    assert fine_tuned_state(ModelSource("base").state, method) == state
    assert fine_tuned_state(ModelSource("base", state=FFT).state, method) == f"continued {state}"
    assert fine_tuned_state(ModelSource("base", state="MFT").state, FftOptions()) == CONTINUED_FFT


def test_a_threshold_and_a_drop_strategy_are_named() -> None:
    assert mask_state(MaskTrainOptions(preset="paper", threshold=-0.035)) == "MFT threshold"
    assert [mask_state(MaskTrainOptions(preset=preset)) for preset in ("default", "paper")] == ["MFT", "MFT, paper"]
    assert mask_state(MaskTrainOptions(method="drop", strategy="salient")) == "salient drop"
    assert mask_state(MaskTrainOptions(method="drop", strategy="random", rescale=True)) == "DARE"


# Layers


def test_layers_are_those_of_the_newest_finished_probe(root: Path) -> None:
    run_probe(root, "base", "0-3")
    run_probe(root, "base", "4-7")
    create_run(root, "probe", {}, inputs=ModelSource("base").as_inputs())
    assert recommended_layers(root, ModelSource("base")) == Recommendation("4-7", "002-probe")


def test_layers_of_another_model_are_not_used(root: Path) -> None:
    first = source_of_run(run_fft(root, ModelSource("base")))
    run_probe(root, first.model, "4-7")
    second = source_of_run(run_fft(root, ModelSource("base")))
    assert recommended_layers(root, second) is None
    assert recommended_layers(root, ModelSource("base")) is None
    assert recommended_layers(root, first) == Recommendation("4-7", "002-probe")


# Ancestry


def states(sources: list[ModelSource]) -> list[str]:
    return [source.state for source in sources]


def test_pre_trained_model_is_its_own_ancestry(root: Path) -> None:
    assert ancestry(root, ModelSource("base")) == [ModelSource("base")]


def test_ancestry_goes_from_the_pre_trained_model_to_the_source(root: Path) -> None:
    fft = source_of_run(run_fft(root, ModelSource("base")))
    continued = source_of_run(run_fft(root, fft))
    masked = source_of_run(run_mask(root, continued))
    assert ancestry(root, masked) == [ModelSource("base", config={"seed": 3}), fft, continued, masked]


def test_state_reached_twice_is_its_newest(root: Path) -> None:
    fft = source_of_run(run_fft(root, ModelSource("base")))
    applied = source_of_run(run_apply(root, source_of_run(run_mask(root, fft))))
    found = ancestry(root, applied)
    assert states(found) == [PRE_TRAINED, FFT, "MFT"]
    assert found[-1] == applied


def test_source_comes_last_even_if_its_state_occurred_before(root: Path) -> None:
    fft = source_of_run(run_fft(root, ModelSource("base")))
    applied = source_of_run(run_apply(root, source_of_run(run_mask(root, fft))))
    masked_again = source_of_run(run_mask(root, source_of_run(run_fft(root, applied))))
    found = ancestry(root, masked_again)
    assert states(found) == [PRE_TRAINED, FFT, CONTINUED_FFT, "MFT"]
    assert found[-1] == masked_again


def test_ancestry_with_a_missing_run_is_a_run_error(root: Path) -> None:
    run = run_fft(root, ModelSource("base"))
    source = source_of_run(run)
    (run.folder / "run.json").unlink()
    with pytest.raises(RunError, match="not a readable run folder"):
        ancestry(root, source)


@pytest.mark.parametrize(
    ("made_with", "expected"),
    [
        ({"learning_rate": 3e-4}, 3e-4),
        ({"learning_rate": 1e-3, "method": "lora"}, FftOptions().learning_rate),
        ({"learning_rate": 1e-3, "method": "shira"}, FftOptions().learning_rate),
        ({}, 2e-5),
    ],
    ids=str,
)
def test_the_rate_of_fine_tuning_is_that_of_the_run(made_with: dict[str, Any], expected: float) -> None:
    config = to_document(Recipe.model_validate({"fft": made_with}))
    other = Recipe.model_validate({"fft": {"learning_rate": 7.0}})
    assert fft_learning_rate(ModelSource("tuned", config=config), other) == expected


def test_the_rate_of_fine_tuning_without_a_run_is_that_of_the_recipe() -> None:
    recipe = Recipe.model_validate({"fft": {"learning_rate": 3e-4}})
    assert fft_learning_rate(ModelSource("tuned"), recipe) == 3e-4


# Combined models, and the model before fine-tuning


def test_combined_models_have_the_runs_of_all_and_the_rest_of_the_first() -> None:
    first = ModelSource("a", state=FFT, parents=("001-fft", "002-fft"), origin="base")
    second = ModelSource("b", state=FFT, parents=("001-fft", "003-fft"), origin="other", config={"seed": 1})
    assert combined_source([first, second]) == replace(
        first, parents=("001-fft", "002-fft", "003-fft"), config={"seed": 1}
    )
    assert combined_source([ModelSource("hub/a"), ModelSource("hub/b")]) == ModelSource("hub/a")


def test_the_model_before_fine_tuning_is_the_given_one_or_the_origin() -> None:
    tuned = ModelSource("tuned", state=FFT, origin="base")
    assert known_base(tuned, None, key="k", what="It") == "base"
    assert known_base(tuned, "given", key="k", what="It") == "given"


@pytest.mark.parametrize("origin", ["", "tuned"])
def test_an_unknown_model_before_fine_tuning_is_an_error(origin: str) -> None:
    with pytest.raises(ConfigError, match="It needs the model before fine-tuning") as caught:
        known_base(ModelSource("tuned", origin=origin), None, key="a.base", what="It")
    assert (caught.value.key, caught.value.hint) == ("a.base", "--base MODEL")
    assert "tuned" in str(caught.value.actual)


@pytest.mark.parametrize("command", ["average", "interpolate"])
def test_a_model_of_a_command_that_combines_comes_from_its_run(root: Path, command: str) -> None:
    fft = source_of_run(run_fft(root, ModelSource("base")))
    run = create_run(root, command, {"seed": 3}, inputs=fft.as_inputs())
    (run.folder / "model").mkdir()
    run.finish(partial_result({"state": "combined", "model": str((run.folder / "model").resolve())}))
    made = source_of_model(f"runs/{run.name}/model", root)
    assert (made.state, made.parents, made.origin) == ("combined", ("001-fft", run.name), "base")
