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
from mftctl.experiments.state_names import CONTINUED_FFT, FFT
from mftctl.progress import Listener


@dataclass(frozen=True, slots=True)
class Corners:
    """Three finished runs of one family.

    Attributes:
        fft: The fine-tuning of all weights.
        continued: The fine-tuning that goes on from its model.
        mft: The `mask-train` that learned a mask of its model, or the `apply` that wrote the masked model.
        recipe: That of `fft`, with the test data that its models are measured on.
    """

    fft: Run
    continued: Run
    mft: Run
    recipe: Recipe

    def runs(self) -> tuple[Run, Run, Run]:
        """All three, FFT first."""
        return self.fft, self.continued, self.mft


def find_corners(root: Path, listener: Listener) -> Corners:
    """The newest FFT run that a continued FFT and an MFT start from, with both.

    Of several continued FFTs it is the newest; of several masks the one that lowers the validation loss most.

    Args:
        root: The runs folder.
        listener: Hears what was found, and which newer FFT runs are passed over.

    Raises:
        RunError: One of the three is missing, for the newest FFT run, or no test data is known; it names the command
            that makes it.
    """
    runs = [run for run in list_runs(root)[0] if run.record.status == "finished"]
    tuned = [run for run in reversed(runs) if run.record.command == "fft" and state_of(run) == FFT and _is_there(run)]
    problems: list[RunError] = []
    for fft in tuned:
        try:
            found = Corners(fft, _continued(fft, runs), _mft(fft, runs), _recipe(fft, runs))
        except RunError as error:
            problems.append(error)
            continue
        for newer, problem in zip(tuned, problems, strict=False):
            listener.note(f"{newer.name} is passed over. {problem.message}")
        listener.note(f"Surface through {', '.join(f'{run.name} ({state_of(run)})' for run in found.runs())}")
        return found
    if problems:
        raise problems[0]
    raise RunError(
        "There is no FFT run to draw a loss surface around.",
        path=root,
        expected="a finished fft run of all weights, its model in place",
        actual=_listed(run for run in runs if run.record.command == "fft"),
        hint="mftctl fft",
    )


def state_of(run: Run) -> str:
    """What a run made, in the words of the papers."""
    return run.result(Outcome).state


def _continued(fft: Run, runs: Sequence[Run]) -> Run:
    tuned = [run for run in runs if run.record.command == "fft" and _starts_from(run, fft)]
    found = [run for run in tuned if state_of(run) == CONTINUED_FFT and _is_there(run)]
    if not found:
        raise RunError(
            f"No continued FFT starts from {fft.name}.",
            path=fft.folder,
            expected="a finished fft run of all weights that goes on from its model, with its own model in place",
            actual=_listed(tuned),
            hint=f"mftctl fft --model {fft.result(MadeModel).model} --keep last",
        )
    return found[-1]


def _mft(fft: Run, runs: Sequence[Run]) -> Run:
    made = [run for run in runs if run.record.command in ("mask-train", "apply") and _starts_from(run, fft)]
    found = [run for run in made if state_of(run).startswith("MFT") and _is_there(run)]
    masks = [run for run in found if run.record.command == "mask-train"]
    if masks:
        return min(reversed(masks), key=_change)
    if not found:
        raise RunError(
            f"No learned mask of {fft.name} is there.",
            path=fft.folder,
            expected="a finished mask-train run with method learned, its mask in place; or its model, written by apply",
            actual=_listed(made),
            hint=f"mftctl mask-train --model {fft.result(MadeModel).model}",
        )
    return found[-1]


def _change(run: Run) -> float:
    losses = run.result(MaskLosses)
    return losses.best_loss - losses.unmasked_loss


def _recipe(fft: Run, runs: Sequence[Run]) -> Recipe:
    """The recipe of a run; where it has no test data, with that of the newest evaluation of one of its models."""
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
    """Whether a run worked on the model of `fft`, which another runs folder may name too."""
    model = run.record.inputs.get("model")
    return model is not None and Path(model).resolve() == Path(fft.result(MadeModel).model).resolve()


def _is_there(run: Run) -> bool:
    """Whether what the run made was not deleted since."""
    outcome = run.result(Outcome)
    made = outcome.mask if run.record.command == "mask-train" else outcome.model
    return made is not None and Path(made).exists()


def _listed(runs: Iterable[Run]) -> str:
    return ", ".join(f"{run.name} ({state_of(run)})" for run in runs) or "none"
