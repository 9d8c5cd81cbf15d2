"""The model that `fft` trains with an adapter: a new adapter, or that of an earlier run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from mftctl.errors import ChangedDataError, ConfigError, MaskMismatchError
from mftctl.experiments.fft_options import FftOptions
from mftctl.experiments.fingerprints import file_digest
from mftctl.experiments.run_inputs import RunInputs
from mftctl.masking.checkpoints.load import load_model
from mftctl.masking.checkpoints.load_weights import stored_dtype, whole_checkpoint
from mftctl.masking.checkpoints.locate import is_adapter
from mftctl.masking.checkpoints.mask_support import check_support, kept_positions, left_out_text, read_support
from mftctl.masking.checkpoints.meta_models import build_skeleton
from mftctl.masking.hub_masks import local_mask
from mftctl.progress import Listener
from mftctl.runtime.devices import best_device, frozen_dtype
from mftctl.runtime.processes import spreads_parameters
from mftctl.runtime.torch_failures import gpu_failures

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class SupportMask:
    """The mask whose kept weights an adapter trains.

    Attributes:
        file: The mask file on this machine.
        digest: SHA-256 of the file.
    """

    file: Path
    digest: str | None


def check_adapter(options: FftOptions, checkpoint: Path, before: RunInputs) -> SupportMask | None:
    """Checks an adapter's options against the checkpoint before anything is loaded; returns the mask if there is one.

    Args:
        options: The recipe's `fft` section.
        checkpoint: The model to start from, possibly an adapter.
        before: The inputs of the run when it began, for a resumed run.

    Raises:
        ConfigError: The model is an adapter of another method, or parameters are sharded across processes.
        MaskFileError: The mask is not on this machine, and the hub does not have it.
        MaskFormatError: The mask is damaged or not a mask.
        MaskMismatchError: The mask does not fit the checkpoint.
        ChangedDataError: The mask has changed since the run began.
    """
    if not options.trains_adapter:
        return None
    if spreads_parameters():
        raise ConfigError(
            "An adapter has too few weights to be worth sharding across processes.",
            key="fft.method",
            expected="a method without an adapter under DeepSpeed or FSDP",
            actual=options.method,
            hint="recipes/accelerate/ddp.yaml",
        )
    if is_adapter(checkpoint):
        _require_same_method(checkpoint, options)
    if options.support is None:
        return None
    file = local_mask(options.support)
    check_support(file, whole_checkpoint(checkpoint))
    found = SupportMask(file, file_digest(str(file)))
    if before.support_sha256 is not None and before.support_sha256 != found.digest:
        raise ChangedDataError(
            "The mask has changed since this run began.",
            path=file,
            key="fft.support",
            expected=f"SHA-256 {before.support_sha256}",
            actual=found.digest,
            hint="restore the mask, or start a new run without --resume",
        )
    return found


def adapted_model(
    checkpoint: Path, base: str, options: FftOptions, seed: int, mask: SupportMask | None, listener: Listener
) -> PeftModel:
    """A frozen model, in its compute dtype or in 4 bits per weight, with an adapter in fp32.

    Args:
        checkpoint: The model to start from; the adapter in such a folder is trained further.
        base: The model's name or folder, recorded as a new adapter's base.
        options: The recipe's `fft` section.
        seed: Decides the initial values of a new adapter or, with SHiRA, which weights it changes.
        mask: From `check_adapter`.
        listener: Receives a warning about masked tensors that are not trained.

    Raises:
        ConfigError: The model has no projections of the kind that the method adapts.
        MaskMismatchError: The adapter cannot train exactly the weights that the mask keeps.
        ModelError: The model cannot be loaded.
    """
    from mftctl.masking.checkpoints.adapters import load_adapter
    from mftctl.masking.checkpoints.quantization import load_quantized
    from mftctl.training.updates.adapters import add_adapter

    device, quantize = best_device(), options.quantize is not None
    dtype = _dtype(options, checkpoint)
    with gpu_failures("loading the model"):
        if is_adapter(checkpoint):
            adapted = load_adapter(checkpoint, dtype=dtype, trainable=True, quantize=quantize, device=device)
            if mask is not None:
                _require_positions(adapted, mask)
            return adapted.to(device)
        model = load_quantized(checkpoint, device) if quantize else load_model(checkpoint, dtype=dtype)
        if mask is not None:
            remark = left_out_text(read_support(mask.file, model))
            if remark is not None:
                listener.warn(remark)
        return add_adapter(model, options, base=base, seed=seed, mask=None if mask is None else mask.file)


def _dtype(options: FftOptions, checkpoint: Path) -> torch.dtype:
    """The dtype of the frozen weights: fp32 where bf16 would round weights that an adapter leaves unchanged."""
    dtype = frozen_dtype(options.precision)
    if options.trains_positions and stored_dtype(checkpoint) != dtype:
        return torch.float32
    return dtype


def _require_same_method(checkpoint: Path, options: FftOptions) -> None:
    from mftctl.masking.checkpoints.adapters import adapter_method

    method = adapter_method(checkpoint)
    if method != options.method:
        raise ConfigError(
            "The model is an adapter of another method, which cannot be continued with this one.",
            path=checkpoint,
            key="fft.method",
            expected=method,
            actual=options.method,
            hint=f"--method {method}, or train that adapter with --merge",
        )


def _require_positions(adapted: PeftModel, mask: SupportMask) -> None:
    """Checks that an adapter changes exactly the weights that a mask keeps.

    Raises:
        MaskMismatchError: It changes others.
    """
    from mftctl.masking.checkpoints.sparse_adapters import trained_positions

    base = build_skeleton(cast("PreTrainedModel", adapted.get_base_model()).config, torch.float32)
    kept = kept_positions(mask.file, read_support(mask.file, base))
    trained = trained_positions(adapted)
    names = [*kept, *(name for name in trained if name not in kept)]
    for name in names:
        if name not in kept or name not in trained or not torch.equal(trained[name].sort().values, kept[name]):
            raise MaskMismatchError(
                "The adapter to continue changes other weights than the mask keeps.",
                path=mask.file,
                key=name,
                expected="the mask it was trained with, or none",
                hint="--set fft.support=null",
            )
