"""Delta files of linear layers as Super-Tuning adapters of peft, and back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mftctl.errors import MaskingError, ModelError
from mftctl.files.atomic import Permit, atomic_folder
from mftctl.files.json_files import read_json_object
from mftctl.files.ownership import Kind, write_marker
from mftctl.masking.checkpoints.locate import ADAPTER_FILE
from mftctl.masking.checkpoints.pairing import TensorPair
from mftctl.masking.checkpoints.tensors import StoredTensor, read_tensor, tensor_index
from mftctl.masking.delta.adapter_format import INDICES, PREFIX, VALUES, added_values, entries, settle_sparsity
from mftctl.masking.delta.apply import changed_tensor
from mftctl.masking.delta.delta import Delta
from mftctl.masking.delta.document import DeltaContents
from mftctl.masking.delta.encode import digest_of, encode_change
from mftctl.masking.delta.linear_modules import LinearModules
from mftctl.masking.delta.match import require_base
from mftctl.masking.delta.records import DeltaMetadata, NamedModel
from mftctl.masking.delta.selection import Selection, select_entries
from mftctl.masking.delta.spool import payload_spool
from mftctl.masking.delta.store import Outcome, store_changes, write_with_files
from mftctl.masking.dtypes import TORCH_DTYPES

ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
_TYPE: Final = "SUPERTUNING"
_CONFIGURATION: Final = "config.json"


@dataclass(frozen=True, slots=True)
class ExportedAdapter:
    """Summary of an adapter that was written.

    Attributes:
        layers: Number of layers that it changes.
        entries: Number of their entries, those that fill up a layer included.
        filled: Number of entries to which nothing is added.
        inexact: Number of weights that peft's sum does not give exactly.
        bytes_written: Size of its weights.
    """

    layers: int
    entries: int
    filled: int
    inexact: int
    bytes_written: int


def export_adapter(
    delta: Delta, base: Path, output: Path, permit: Permit, *, base_model: NamedModel
) -> ExportedAdapter:
    """Writes a delta file as a Super-Tuning adapter, whole or not at all.

    Args:
        delta: A delta of linear layers alone; files in it are written beside the adapter.
        base: The base's folder.
        output: The adapter's folder.
        permit: Decides whether an existing folder may be replaced.
        base_model: Name of the base, which peft loads.

    Raises:
        MaskMismatchError: The delta was made from another base.
        MaskingError: The adapter cannot hold a change; says why.
        ModelError: The base cannot be read, or the adapter cannot be written.
        OutputError: The permit refuses.
    """
    modules, index, records = LinearModules(base), tensor_index(base), delta.contents.tensors
    if _CONFIGURATION in delta.contents.files:
        raise MaskingError(
            "The delta file changes the model's configuration, which an adapter cannot do.",
            path=delta.path,
            key=_CONFIGURATION,
            expected="the configuration of the base",
            hint="give the configuration of the base to the fine-tuned model before mftctl delta",
        )
    require_base(delta, base)
    names = {name: modules.module_of(index[name]) for name in records}
    sparsity = settle_sparsity({name: (record.kept, record.weights) for name, record in records.items()})
    tensors: dict[str, torch.Tensor] = {}
    inexact = 0
    for name, module in names.items():
        indices, values, wrong = _entries(delta, index[name], entries(records[name].weights, sparsity))
        tensors |= {f"{PREFIX}{module}.{INDICES}": indices, f"{PREFIX}{module}.{VALUES}": values}
        inexact += wrong
    try:
        with atomic_folder(output, permit) as folder:
            save_file(tensors, folder / ADAPTER_WEIGHTS, {"format": "pt"})
            config = _configuration(list(names.values()), sparsity, base_model)
            (folder / ADAPTER_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            for name in delta.contents.files:  # such as a chat template, which is looked for beside the adapter
                (folder / name).write_bytes(delta.file(name))
            write_marker(folder, Kind.MODEL)
            bytes_written = (folder / ADAPTER_WEIGHTS).stat().st_size
    except (OSError, SafetensorError) as error:
        raise ModelError("The adapter could not be written.", path=output, actual=str(error)) from error
    total = sum(entries(record.weights, sparsity) for record in records.values())
    filled = total - sum(record.kept for record in records.values())
    return ExportedAdapter(len(names), total, filled, inexact, bytes_written)


def import_adapter(
    adapter: Path,
    base: Path,
    output: Path,
    *,
    base_model: NamedModel,
    run_id: str | None = None,
    permit: Permit | None = None,
) -> DeltaContents:
    """Writes the changes of a Super-Tuning adapter as a delta file with exact values, as peft merges them.

    Args:
        adapter: The adapter's folder.
        base: The folder of its base.
        output: The delta file.
        base_model: Name of the base.
        run_id: The run that makes the file.
        permit: Decides whether an existing file at `output` may be replaced; None replaces any file.

    Raises:
        ModelError: The adapter cannot be read, is of another type or does not fit the base; or changes nothing.
        MaskFileError: The file cannot be written.
        OutputError: `output` holds something that may not be replaced.
    """
    _require_plain(adapter)
    index, modules = tensor_index(base), LinearModules(base)
    try:
        with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as weights, payload_spool(output) as spool:
            layers = _layers(adapter, set(weights.keys()), modules, index)
            total_bytes = sum(stored.length_bytes for stored in layers.values())
            found = store_changes(base, _outcomes(adapter, weights, layers), spool, total_bytes, None)
            if not found.tensors:
                raise ModelError("The adapter changes nothing.", path=adapter, expected="a value other than 0")
            metadata = DeltaMetadata(
                values="exact", base=base_model, tuned=(NamedModel(str(adapter)),), method="imported", run_id=run_id
            )
            return write_with_files(output, metadata, found, {}, spool, permit)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            "The adapter's weights cannot be read.", path=adapter / ADAPTER_WEIGHTS, actual=str(error)
        ) from error


def _entries(delta: Delta, stored: StoredTensor, count: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The indices and values of a layer, and the number of sums that are not exact."""
    before, after = read_tensor(stored).reshape(-1), changed_tensor(delta, stored).reshape(-1)
    keep = delta.bits(stored.name).part(0, before.numel())
    places = np.flatnonzero(keep)
    spare = np.flatnonzero(~keep)[: count - len(places)]
    values, wrong = added_values(before[places], after[places])
    indices = torch.from_numpy(np.concatenate([places, spare])).to(torch.int32)
    # Adding -0.0 leaves every number as it is, -0.0 included.
    return indices, torch.cat([values, torch.full((len(spare),), -0.0)]), wrong


def _configuration(modules: list[str], sparsity: float, base_model: NamedModel) -> dict[str, Any]:
    from peft import SupertuningConfig

    config = SupertuningConfig(
        base_model_name_or_path=base_model.model,
        revision=base_model.revision,
        task_type="CAUSAL_LM",
        inference_mode=True,
        target_modules=modules,
        sparsity=sparsity,
    ).to_dict()
    return {**config, "target_modules": sorted(modules), "peft_type": _TYPE, "task_type": "CAUSAL_LM"}


def _require_plain(adapter: Path) -> None:
    """Checks that an adapter only adds values to stated entries of linear layers."""
    try:
        settings = read_json_object(adapter / ADAPTER_FILE)
    except (OSError, ValueError) as error:
        raise ModelError("The adapter's configuration cannot be read.", path=adapter, actual=error) from error
    for key, expected in (
        ("peft_type", _TYPE),
        ("r", None),
        ("modules_to_save", None),
        ("save_precomputed_indices", True),
    ):
        if settings.get(key, True if key == "save_precomputed_indices" else None) != expected:
            raise ModelError(
                "This adapter cannot become a delta file.",
                path=adapter / ADAPTER_FILE,
                key=key,
                expected=expected if expected is not None else "none",
                actual=str(settings.get(key))[:80],
                hint="merge it into its base with peft, then mftctl delta BASE MERGED",
            )


def _layers(
    adapter: Path, names: set[str], modules: LinearModules, index: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """The weights that an adapter changes, by module."""
    found = {name.removeprefix(PREFIX).rpartition(".")[0] for name in names}
    expected = {f"{PREFIX}{module}.{part}" for module in found for part in (INDICES, VALUES)}
    strange = min(names ^ expected, default=None)
    layers = {}
    for module in sorted(found):
        weight = modules.weight_of(module, index)
        if weight is None:
            strange = strange or module
        else:
            layers[module] = index[weight]
    if strange is not None:
        raise ModelError(
            "The adapter does not fit the base.",
            path=adapter / ADAPTER_WEIGHTS,
            key=strange,
            expected="indices and values of linear layers of the base",
        )
    return layers


def _outcomes(adapter: Path, weights: Any, layers: Mapping[str, StoredTensor]) -> Iterator[tuple[str, Outcome]]:
    for module, stored in layers.items():
        before = read_tensor(stored)
        after = before.clone()
        indices = weights.get_tensor(f"{PREFIX}{module}.{INDICES}").to(torch.int64)
        values = weights.get_tensor(f"{PREFIX}{module}.{VALUES}")
        inside = indices.shape == values.shape and bool(((indices >= 0) & (indices < before.numel())).all())
        if not inside or stored.dtype not in TORCH_DTYPES:
            raise ModelError(
                "The adapter does not fit a layer of the base.",
                path=adapter / ADAPTER_WEIGHTS,
                key=module,
                expected=f"as many values as indices below {before.numel():,}",
                actual=f"{tuple(values.shape)} values, {tuple(indices.shape)} indices",
            )
        after.reshape(-1).scatter_add_(0, indices, values.to(before.dtype))
        pair = TensorPair(stored.name, stored, stored)
        kept = select_entries(pair, before, after, Selection(), "exact")
        if kept.kept:
            yield stored.name, encode_change(pair, before, after, kept, "exact", base_sha256=digest_of(before))
