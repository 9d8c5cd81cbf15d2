"""The three runs that span a loss surface: FFT, continued FFT and MFT."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mftctl.errors import RunError
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.recipe_files import load_recipe, with_changes
from mftctl.experiments.results import MadeModel, MaskLosses, Outcome
from mftctl.experiments.run_folder import Run, list_runs
from mftctl.experiments.run_inputs import RunInputs
from mftctl.experiments.run_record import RunStatus
from mftctl.experiments.state_names import CONTINUED_FFT, FFT, known_state
from mftctl.progress import Listener


@dataclass(frozen=True, slots=True)
class Corners:
    """Three finished runs that belong together.

    Attributes:
        fft: The run that fine-tuned all weights.
        continued: The run that continued fine-tuning from its model.
        mft: The `mask-train` run that learned a mask for its model, or the `apply` run that wrote the masked model.
        recipe: The recipe of `fft`, with the test data its models are evaluated on.
    """

    fft: Run
    continued: Run
    mft: Run
    recipe: Recipe

    def runs(self) -> tuple[Run, Run, Run]:
        """All three runs, FFT first."""
        return self.fft, self.continued, self.mft


def find_corners(root: Path, listener: Listener) -> Corners:
    """The latest FFT run from which both a continued FFT and an MFT run start, with these two.

    Of several continued FFT runs it takes the latest; of several masks, the one that lowers the validation loss most.

    Args:
        root: The runs folder.
        listener: Receives notes on the runs found and on newer FFT runs that are skipped.

    Raises:
        RunError: One of the three is missing for the latest FFT run, or no test data is known; the error names the
            command that creates it.
    """
    runs = [run for run in list_runs(root)[0] if run.record.status == RunStatus.FINISHED]
    tuned = [run for run in reversed(runs) if run.record.command == "fft" and state_of(run) == FFT and _is_there(run)]
    problems: list[RunError] = []
    for fft in tuned:
        try:
            found = Corners(fft, _continued(fft, runs), _mft(fft, runs), _recipe(fft, runs))
        except RunError as error:
            problems.append(error)
            continue
        for newer, problem in zip(tuned, problems, strict=False):
            listener.note(f"Skipped {newer.name}: {problem.message}")
        listener.note(f"Surface through {', '.join(f'{run.name} ({state_of(run)})' for run in found.runs())}")
        return found
    if problems:
        raise problems[0]
    raise RunError(
        "There is no FFT run for a loss surface.",
        path=root,
        expected="a finished fft run of all weights, with its model in place",
        actual=_listed(run for run in runs if run.record.command == "fft"),
        hint="mftctl fft",
    )


def state_of(run: Run) -> str:
    """The state of a run's model, as named in the papers."""
    return run.result(Outcome).state


def _continued(fft: Run, runs: Sequence[Run]) -> Run:
    tuned = [run for run in runs if run.record.command == "fft" and _starts_from(run, fft)]
    found = [run for run in tuned if state_of(run) == CONTINUED_FFT and _is_there(run)]
    if not found:
        raise RunError(
            f"No continued FFT starts from {fft.name}.",
            path=fft.folder,
            expected="a finished fft run of all weights that continues from its model, with its own model in place",
            actual=_listed(tuned),
            hint=f"mftctl fft --model {fft.result(MadeModel).model} --keep last",
        )
    return found[-1]


def _mft(fft: Run, runs: Sequence[Run]) -> Run:
    made = [run for run in runs if run.record.command in ("mask-train", "apply") and _starts_from(run, fft)]
    found = [run for run in made if _is_mft(run) and _is_there(run)]
    masks = [run for run in found if run.record.command == "mask-train"]
    if masks:
        return min(reversed(masks), key=_change)
    if not found:
        raise RunError(
            f"No learned mask for {fft.name} was found.",
            path=fft.folder,
            expected="a finished mask-train run (method learned) with its mask in place, or its model written by apply",
            actual=_listed(made),
            hint=f"mftctl mask-train --model {fft.result(MadeModel).model}",
        )
    return found[-1]


def _is_mft(run: Run) -> bool:
    state = known_state(state_of(run))
    return state is not None and state.is_mft and not state.is_preference


def _change(run: Run) -> float:
    losses = run.result(MaskLosses)
    return losses.best_loss - losses.unmasked_loss


def _recipe(fft: Run, runs: Sequence[Run]) -> Recipe:
    """The recipe of a run; test data it lacks is taken from the latest evaluation of one of its models."""
    recipe = load_recipe(base=fft.record.config, stages=False)
    if recipe.test_data:
        return recipe
    for run in reversed(runs):
        config = run.record.config
        if run.record.command == "eval" and _starts_from(run, fft) and config.get("test_data"):
            length = load_recipe(base=config, stages=False).eval.max_length_tokens
            return with_changes(recipe, {"test_data": config["test_data"], "eval.max_length_tokens": length})
    raise RunError(
        f"No test data is known for {fft.name}.",
        path=fft.folder,
        expected="test_data in its recipe, or an eval run of its model on a data file",
        actual="neither",
        hint=f"mftctl eval {fft.result(MadeModel).model} --data FILE",
    )


def _starts_from(run: Run, fft: Run) -> bool:
    """True if a run worked on the model of `fft`, possibly under a different path."""
    model = RunInputs.read(run.record.inputs).model
    return model is not None and Path(model).resolve() == Path(fft.result(MadeModel).model).resolve()


def _is_there(run: Run) -> bool:
    """True if the run's output still exists."""
    outcome = run.result(Outcome)
    made = outcome.mask if run.record.command == "mask-train" else outcome.model
    return made is not None and Path(made).exists()


def _listed(runs: Iterable[Run]) -> str:
    return ", ".join(f"{run.name} ({state_of(run)})" for run in runs) or "none"
