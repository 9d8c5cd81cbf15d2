"""Masks for `delta` that data decides about: learned ones, and by the Fisher information."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mftctl.experiments.model_source import ModelSource
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.recipe_files import with_changes
from mftctl.experiments.run_folder import Run
from mftctl.masking.checkpoints.apply_in_memory import spellings
from mftctl.masking.checkpoints.locate import resolve_checkpoint
from mftctl.masking.checkpoints.pairing import TensorPair, pair_base_tensors
from mftctl.masking.checkpoints.tensors import read_tensor
from mftctl.masking.delta.encode import digest_of
from mftctl.masking.mask import Mask
from mftctl.masking.mask_file.codecs import Packed, pack
from mftctl.masking.mask_file.document import MaskMetadata, TensorRecord
from mftctl.masking.parameter_layout import stored_parts
from mftctl.masking.selection import keep_highest
from mftctl.progress import Listener
from mftctl.runtime.torch_failures import gpu_failures
from mftctl.training.gradient_pass import accumulated_gradients
from mftctl.training.mask_search import load_frozen_model, prepare_mask_training
from mftctl.workflows.mask_train import learn_delta_mask
from mftctl.workflows.planning.memory_check import training_on_device


def learned_mask(recipe: Recipe, source: ModelSource, base: str, run: Run, listener: Listener) -> Mask:
    """The delta mask that `mask-train --kind delta` learns, with the ratio of the `delta` section.

    Args:
        recipe: With the sections `delta` and `mask_train`, and the data.
        source: The fine-tuned model.
        base: The model before fine-tuning.
        run: Open run; receives the metrics of the training.
        listener: Receives progress updates.

    Raises:
        MftError: As for `mask_train`.
    """
    changes = {
        "mask_train.method": "learned",
        "mask_train.kind": "delta",
        "mask_train.ratio": recipe.delta.ratio,
        "mask_train.base": base,
        "mask_train.layers": recipe.mask_train.layers or "all",
    }
    return learn_delta_mask(with_changes(recipe, changes), source, run, listener)


def fisher_mask(recipe: Recipe, source: ModelSource, base: str, run: Run, listener: Listener) -> Mask:
    """The delta mask that keeps, in each matrix, the changes with the largest effect on the loss, to second order.

    Undoing a change d of one weight raises the loss by about F d^2 / 2, where F is the diagonal of the Fisher
    information, estimated by the squared gradients of batches at the fine-tuned model.

    Args:
        recipe: With the sections `delta` and `mask_train` (data, batches, precision), and the data.
        source: The fine-tuned model.
        base: The model before fine-tuning.
        run: Open run.
        listener: Receives progress updates.

    Raises:
        ConfigError: The recipe names no data.
        DataError: The data cannot be used.
        DeviceMemoryError: The GPU runs out of memory.
        MaskMismatchError: The checkpoints do not have the same tensors.
        ModelError: A checkpoint cannot be loaded.

    Source: ours; the diagonal of the Fisher information as a measure of importance as in Kirkpatrick et al. 2017 (arXiv
        1612.00796), equation 3.
    """
    options = recipe.mask_train
    with training_on_device("mask-train", recipe, options, run, listener) as room:
        inputs = prepare_mask_training(recipe, source, run, listener, options.data_fraction).inputs
        room.require(inputs)
        pairs = {pair.tuned.name: pair for pair in pair_base_tensors(resolve_checkpoint(base), inputs.checkpoint)}
        model = load_frozen_model(inputs, options)
        parameters = {name: one for name, one in model.named_parameters() if one.dim() > 1}
        with gpu_failures("computing gradients"):
            squares = accumulated_gradients(model, list(parameters.values()), options, inputs, listener, squared=True)
        chosen: dict[str, _Chosen] = {}
        for name, parts in stored_parts(model, parameters).items():
            for part in parts:
                pair = _pair_of(part.name, pairs, model.base_model_prefix)
                if pair is not None:
                    chosen[pair.tuned.name] = _chosen(pair, part.of(squares[parameters[name]]), recipe.delta.ratio)
    metadata = MaskMetadata(
        kind="delta",
        base_model=base,
        base_revision=None,
        method="fisher",
        ratio=recipe.delta.ratio,
        threshold=None,
        layers=None,
        seed=recipe.seed,
        run_id=run.name,
        tuned_model=source.model,
        tuned_revision=recipe.revision,
    )
    packed = {name: one.packed for name, one in chosen.items()}
    return Mask.from_packed(packed, {name: one.record for name, one in chosen.items()}, metadata)


@dataclass(frozen=True, slots=True)
class _Chosen:
    """The kept entries of a tensor, and its record."""

    packed: Packed
    record: TensorRecord


def _chosen(pair: TensorPair, squares: torch.Tensor, ratio: float) -> _Chosen:
    before, after = read_tensor(pair.base), read_tensor(pair.tuned)
    change = after.float() - before.float()
    keep = keep_highest(squares.cpu() * change.square(), ratio)
    record = TensorRecord(
        shape=pair.tuned.shape,
        removed=keep.numel() - int(keep.sum()),
        sha256=digest_of(before),
        dtype=pair.tuned.dtype,
        tuned_sha256=digest_of(after),
    )
    return _Chosen(pack(keep), record)


def _pair_of(name: str, pairs: dict[str, TensorPair], prefix: str) -> TensorPair | None:
    return next((pairs[spelling] for spelling in spellings(name, prefix) if spelling in pairs), None)
