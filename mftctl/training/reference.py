"""Log-probabilities of preferences under the model before training: measured once, and kept in the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn
from transformers import PreTrainedModel

from mftctl.data.batching import pad_token_id
from mftctl.data.encoding import Encoded
from mftctl.data.prepared.arrow_files import MappedTable, write_batches
from mftctl.data.prepared.entries import entry, kept_entry
from mftctl.data.prepared.records import with_reference
from mftctl.errors import ConfigError
from mftctl.evaluation.preferences import answer_scores
from mftctl.experiments.fingerprints import file_digest
from mftctl.masking.checkpoints.load_weights import whole_checkpoint
from mftctl.progress import Listener, Progress
from mftctl.runtime.process_group import any_process, shares_weights, wait_for_all
from mftctl.runtime.processes import is_first
from mftctl.training.inputs import TrainingInputs

if TYPE_CHECKING:
    from peft import PeftModel

_VERSION = 1
"""To be raised with every change of the code that changes the values."""

_SCHEMA = pa.schema([("chosen", pa.float64()), ("rejected", pa.float64())])
_WEIGHTS = ("*.safetensors", "*.bin", "*config.json", "*.py")


@dataclass(frozen=True, slots=True)
class Reference:
    """The model before training, as it computes.

    Attributes:
        model: The model; not yet trained, and without a mask.
        checkpoint: Its folder.
        autocast: Whether it computes in bf16 on wider weights.
        variant: What else affects its values, such as a quantisation.
    """

    model: PreTrainedModel | PeftModel
    checkpoint: Path
    autocast: bool = False
    variant: str = ""


def with_references(
    inputs: TrainingInputs, parts: Sequence[Sequence[Encoded]], reference: Reference, listener: Listener
) -> tuple[TrainingInputs, list[Sequence[Encoded]]]:
    """The inputs of a training on preferences with their log-probabilities under the model before training.

    Must be called in all processes at once.

    Args:
        inputs: The inputs of the training.
        parts: The parts of the validation records that are measured separately, in order.
        reference: The model before training.
        listener: Receives progress updates, and a note on values from the cache.

    Returns:
        The inputs with the first part as the validation records, and all parts.

    Raises:
        ConfigError: The processes share the weights.
    """
    require_whole_reference()
    padding = pad_token_id(inputs.tokenizer)
    model = _model_key(reference)
    train = _known(inputs.train, model, reference, padding, listener)
    measured = [_known(part, model, reference, padding, listener) for part in parts]
    return replace(inputs, train=train, validation=measured[0]), measured


def require_whole_reference() -> None:
    """Checks that each process holds the whole model before training.

    Raises:
        ConfigError: ZeRO-3 or FSDP shards it.
    """
    if shares_weights():
        raise ConfigError(
            "The objective dpo needs the whole model in each process, to measure it before training.",
            key="objective",
            expected="one process, or --shard ddp or zero2",
            actual="ZeRO-3 or FSDP, which shard the weights",
        )


def turn_off_dropout(model: nn.Module, listener: Listener) -> None:
    """Trains without dropout, whose noise would count as a difference from the reference.

    Args:
        model: The model to train.
        listener: Receives a note if the model has any dropout.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Dropout) and module.p > 0]
    for layer in layers:
        layer.p = 0.0
    if layers:
        listener.note("Dropout is off: the objective is dpo.")


def _known(
    records: Sequence[Encoded], model: dict[str, Any], reference: Reference, padding: int, listener: Listener
) -> Sequence[Encoded]:
    """The records with their log-probabilities, from the cache or newly measured."""
    if not len(records):
        return records
    key = {"what": "reference log-probabilities", "version": _VERSION, **model, "records": _records_digest(records)}
    kept = kept_entry(key)
    if not any_process(kept is None) and kept is not None:
        listener.note(f"Reference log-probabilities of {len(records):,} records: from the cache")
        rows = MappedTable(kept.table)
        return with_reference(records, np.stack([rows.numbers("chosen"), rows.numbers("rejected")], axis=1))
    values = _measured(records, reference, padding, listener)
    if is_first():
        entry(key, lambda path: _write(path, values), listener)
    wait_for_all()
    return with_reference(records, values)


def _measured(records: Sequence[Encoded], reference: Reference, padding: int, listener: Listener) -> np.ndarray:
    model = reference.model
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=reference.autocast):
        found = answer_scores(
            model,  # type: ignore[arg-type] # a PeftModel has what is used of it
            records,
            pad_token_id=padding,
            on_progress=lambda done, total: listener.progress(Progress("measuring the reference", done, total)),
        )
    return found.log_probs.numpy()


def _write(path: Path, values: np.ndarray) -> dict[str, Any]:
    columns = [pa.array(column) for column in values.T]
    write_batches(path, _SCHEMA, [pa.record_batch(columns, schema=_SCHEMA)])
    return {"records": len(values)}


def _model_key(reference: Reference) -> dict[str, Any]:
    """What the values depend on apart from the records."""
    model = reference.model
    folders = dict.fromkeys([reference.checkpoint, whole_checkpoint(reference.checkpoint)])
    return {
        "model": [_weights_digest(folder) for folder in folders],
        "dtype": str(next(model.parameters()).dtype),
        "autocast": reference.autocast,
        "variant": reference.variant,
        "device": model.device.type,
        "attention": getattr(model.config, "_attn_implementation", None),
        "libraries": {name: version(name) for name in ("torch", "transformers")},
    }


def _weights_digest(folder: Path) -> list[list[str | None]]:
    """The names and SHA-256 digests of the files that determine what a model computes."""
    files = sorted({path for pattern in _WEIGHTS for path in folder.glob(pattern)})
    return [[path.name, file_digest(str(path))] for path in files]


def _records_digest(records: Sequence[Encoded]) -> str:
    """The SHA-256 of the tokens of all sequences, and of which of them are trained on."""
    digest = hashlib.sha256()
    for record in records:
        for side in record.sides:
            tokens = np.array([side.input_ids, side.labels], np.int64)
            digest.update(f"{tokens.shape[1]}:".encode() + tokens.tobytes())
    return digest.hexdigest()
