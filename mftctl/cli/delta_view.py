"""What `mask info` shows of a delta file."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from mftctl.cli.output import pairs_table


def delta_info(file: Path) -> tuple[dict[str, Any], list[Table]]:
    """Returns the document of a delta file for `--json`, and its tables; every tensor is decoded and checked.

    Args:
        file: The delta file.
    """
    from mftctl.masking.delta.delta import open_delta

    with open_delta(file) as delta:
        contents, metadata = delta.contents, delta.contents.metadata
        tensors = {
            name: {**asdict(record), **_sizes(delta.payload_bytes(name))} for name, record in contents.tensors.items()
        }
        for name in contents.tensors:
            delta.change(name)  # also checks it
        for name in contents.files:
            delta.file(name)
        document: dict[str, Any] = {
            "file": str(file),
            "kind": "soft mask" if metadata.kind == "scale" else "delta file",
            "file_bytes": delta.size_bytes,
            "checkpoint_bytes": contents.base_bytes,
            "share": delta.size_bytes / contents.base_bytes,
            "weights": sum(record.weights for record in contents.tensors.values()),
            "changed": sum(record.kept for record in contents.tensors.values()),
            **asdict(metadata),
            "tensors": tensors,
            "unchanged": list(contents.unchanged),
            "left_out": {name: one.reason for name, one in contents.left_out.items()},
            "files": list(contents.files),
        }
    return document, [_summary(document), _tensors(document)]


def _sizes(payload_bytes: tuple[int, int]) -> dict[str, int]:
    return dict(zip(("bits_bytes", "values_bytes"), payload_bytes, strict=True))


def _summary(document: dict[str, Any]) -> Table:
    rows = [
        ("file", document["file"]),
        ("bytes", f"{document['file_bytes']:,}, {document['share']:.2%} of the checkpoint"),
        ("changed", f"{document['changed']:,} of {document['weights']:,} weights"),
        ("values", document["values"]),
        ("base", _label(document["base"])),
    ]
    if document["tuned"]:
        rows.append(("tuned", ", ".join(map(_label, document["tuned"]))))
    rows += [
        (key, f"{document[key]:g}" if isinstance(document[key], float) else str(document[key]))
        for key in ("method", "ratio", "scale", "seed", "run_id")
        if document[key] is not None
    ]
    rows.append(("unchanged", f"{len(document['unchanged']):,} tensors"))
    rows += [("left out", f"{name} ({reason})") for name, reason in document["left_out"].items()]
    if document["files"]:
        rows.append(("files", ", ".join(document["files"])))
    return pairs_table(document["kind"].capitalize(), rows)


def _tensors(document: dict[str, Any]) -> Table:
    table = Table(title="Tensors", title_justify="left")
    table.add_column("tensor", overflow="fold")
    table.add_column("shape", justify="right")
    table.add_column("values")
    for column in ("changed", "bits, bytes", "values, bytes"):
        table.add_column(column, justify="right")
    for name, record in document["tensors"].items():
        numbers = (math.prod(record["shape"]) - record["removed"], record["bits_bytes"], record["values_bytes"])
        shape = " × ".join(map(str, record["shape"]))
        table.add_row(escape(name), shape, record["values"], *(f"{number:,}" for number in numbers))
    return table


def _label(model: dict[str, Any]) -> str:
    return str(model["model"]) + (f" at revision {model['revision']}" if model["revision"] else "")
