"""Takes the built-in model from fine-tuning to its mask, first on the CPU, then on the GPU, and compares the losses."""

from __future__ import annotations

import hashlib
import json
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mftctl.errors import Interrupted
from mftctl.experiments.model_source import ModelSource, source_of_run
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.recipe_files import parse_recipe
from mftctl.experiments.results import MadeMask, MaskLosses
from mftctl.experiments.run_config import to_document
from mftctl.experiments.run_folder import Run, create_run
from mftctl.progress import Progress, Silence
from mftctl.workflows.fft import fine_tune
from mftctl.workflows.mask_train import mask_train
from scripts.gpu_check.findings import Check, Finding, Measurement
from scripts.gpu_check.scale import Scale

_WORK = {"fft": fine_tune, "mask-train": mask_train}
_TOLERANCE = 1e-4
_LOSSES = Path(tempfile.gettempdir()) / "mftctl-gpu-check-cpu-losses.json"


def quickstart_on_the_cpu(scale: Scale) -> Iterator[Finding]:
    """Stores the CPU losses for comparison with the GPU."""
    with tempfile.TemporaryDirectory() as folder:
        losses = [_losses(run) for run in _both_commands(Path(folder), _recipe(scale))]
    _LOSSES.write_text(json.dumps(losses), encoding="utf-8")
    yield Measurement("losses of the CPU", sum(map(len, losses)))


def quickstart_on_the_gpu(scale: Scale) -> Iterator[Finding]:
    """Checks losses, the mask, and bit-identical results on a repeated and a resumed run."""
    with tempfile.TemporaryDirectory() as folder:
        tuned, masked = _both_commands(Path(folder) / "plain", _recipe(scale))
        expected = json.loads(_LOSSES.read_text(encoding="utf-8"))
        for run, its in zip((tuned, masked), expected, strict=True):
            mine = _losses(run)
            apart = max(abs(a - b) for a, b in zip(mine, its, strict=True))
            command = run.record.command
            yield Check(f"{command}: losses within {_TOLERANCE} of the CPU's", apart <= _TOLERANCE, f"{apart:.2e}")
        yield Check("mask-train writes a mask", Path(masked.result(MadeMask).mask).is_file())
        yield Measurement("mask-train: change in loss", _change(masked))
        yield from _repeated(Path(folder), scale)


def _repeated(folder: Path, scale: Scale) -> Iterator[Check]:
    recipe = _recipe(scale, deterministic=True)
    first, again = (_both_commands(folder / name, recipe) for name in ("first", "again"))
    for run, other in zip(first, again, strict=True):
        yield Check(f"{run.record.command} --deterministic: the same bits again", _bits(run) == _bits(other))
    source = source_of_run(first[0])
    for command, of, whole in (("fft", ModelSource("quickstart"), first[0]), ("mask-train", source, first[1])):
        run = create_run(folder / "stopped", command, to_document(recipe), inputs=of.as_inputs())
        stopped = False
        try:
            _WORK[command](recipe, of, run, _Interrupter(scale.quickstart_steps // 2))
        except Interrupted:
            stopped = True
        run.finish(_WORK[command](recipe, of, run, Silence(), resume=True))
        yield Check(f"{command} --deterministic: the same bits after a stop", stopped and _bits(run) == _bits(whole))


def _both_commands(folder: Path, recipe: Recipe) -> tuple[Run, Run]:
    tuned = _finished(folder, "fft", recipe, ModelSource("quickstart"))
    return tuned, _finished(folder, "mask-train", recipe, source_of_run(tuned))


def _finished(folder: Path, command: str, recipe: Recipe, source: ModelSource) -> Run:
    run = create_run(folder, command, to_document(recipe), inputs=source.as_inputs())
    run.finish(_WORK[command](recipe, source, run, Silence()))
    return run


def _recipe(scale: Scale, **changes: Any) -> Recipe:
    training = {
        "max_steps": scale.quickstart_steps,
        "val_steps": max(1, scale.quickstart_steps // 2),
        "batch_size": scale.quickstart_records,
        "max_length_tokens": 128,
        "precision": "fp32",
        **changes,
    }
    return parse_recipe(
        {
            "model": "quickstart",
            "data": "quickstart=500",
            "val_data": f"quickstart/validation={scale.quickstart_records}",
            "fft": {**training, "learning_rate": 1.5e-3, "keep": "last"},
            "mask_train": {**training, "layers": "all", "learn_from": "all"},
        }
    )


def _losses(run: Run) -> list[float]:
    return [loss for line in run.training.metrics() for loss in (line.loss, line.eval_loss) if loss is not None]


def _change(run: Run) -> float:
    losses = run.result(MaskLosses)
    return losses.best_loss - losses.unmasked_loss


def _bits(run: Run) -> str:
    """A digest of a run's output: the weights, or a mask's bits and losses (its file also holds the run's name)."""
    result = run.record.result
    if run.record.command == "fft":
        return hashlib.sha256((Path(result["model"]) / "model.safetensors").read_bytes()).hexdigest()
    from mftctl.masking.mask import load_mask

    mask = load_mask(Path(result["mask"]))
    return json.dumps([_losses(run), [[name, mask[name].nonzero().tolist()] for name in sorted(mask.names())]])


class _Interrupter(Silence):
    """Raises SIGINT at a given step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def progress(self, state: Progress) -> None:
        """Counts training steps."""
        if state.task == "training" and state.done == self._step:
            self._step = -1
            signal.raise_signal(signal.SIGINT)
