"""Models with real shapes and random weights, and data for them; nothing is downloaded or written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from mftctl.data.encoding import Encoded
from mftctl.experiments.run_inputs import Digests, TemplateRecord
from mftctl.masking.checkpoints.load import load_tokenizer
from mftctl.masking.checkpoints.locate import resolve_checkpoint
from mftctl.training import loop
from mftctl.training.inputs import TrainingInputs
from mftctl.training.score_trainer import ScoreTrainer
from mftctl.training.update_trainer import UpdateTrainer
from mftctl.workflows import adapted_model, fft
from scripts.gpu_check.measuring import DEVICE
from scripts.gpu_check.scale import Scale, Shape

_VALIDATION_RECORDS = 8


def random_model(shape: Shape, dtype: torch.dtype, *, emulated: bool) -> PreTrainedModel:
    """A Llama on the GPU, in evaluation mode.

    Args:
        shape: Shape of the model.
        dtype: Dtype of the weights.
        emulated: Whether the GPU is emulated, so that random numbers come from the CPU.
    """
    torch.manual_seed(0)
    config = LlamaConfig(**shape.settings())
    with torch.device("cpu" if emulated else DEVICE):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    model.to(DEVICE)  # type: ignore[arg-type]
    return model.eval()  # type: ignore[no-any-return,no-untyped-call]


def random_inputs(scale: Scale, shape: Shape, accumulation: int) -> TrainingInputs:
    """Records of equal length, the second half of each an answer, with the built-in model's tokenizer.

    Args:
        scale: Counts and lengths.
        shape: Shape of the model, for its vocabulary size.
        accumulation: Forward passes per step.
    """
    checkpoint = resolve_checkpoint("quickstart")
    generator = torch.Generator().manual_seed(0)
    half = scale.length_tokens // 2

    def record(number: int) -> Encoded:
        ids = torch.randint(6, shape.vocab_size, (scale.length_tokens,), generator=generator).tolist()
        return Encoded(input_ids=ids, labels=[-100] * half + ids[half:], where=f"random:{number}")

    train = [record(number) for number in range(scale.records * accumulation * scale.steps)]
    validation = [record(number) for number in range(_VALIDATION_RECORDS)]
    digests = np.empty(0, np.uint64)
    return TrainingInputs(
        checkpoint, load_tokenizer(checkpoint), train, validation, Digests(), digests, 0, TemplateRecord(), {}
    )


def _nothing(*_: Any) -> None:
    """A no-op that replaces skipped work."""


@contextmanager
def in_place_of_checkpoints(shape: Shape, *, emulated: bool) -> Iterator[None]:
    """Context in which fine-tuning loads a random model and no checkpoints are written, which would take minutes."""

    def load(folder: Any, *, dtype: torch.dtype, device: Any = None, **_: Any) -> PreTrainedModel:
        return random_model(shape, dtype, emulated=emulated)

    with (
        mock.patch.object(fft, "load_model", load),
        mock.patch.object(adapted_model, "load_model", load),
        mock.patch.object(loop.SftTrainer, "_save_checkpoint", _nothing),
        mock.patch.object(ScoreTrainer, "_load_best_model", _nothing),
        mock.patch.object(UpdateTrainer, "_load_best_model", _nothing),
    ):
        yield
