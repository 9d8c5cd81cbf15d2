"""Runs of an experiment's stages, identified by the digest of everything that determines their result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mftctl.experiments.deciding_keys import in_names_of_today
from mftctl.experiments.fingerprints import digest_of
from mftctl.experiments.run_folder import Run, list_runs
from mftctl.experiments.run_record import STAGE_BEFORE

_ON_STAGES = (STAGE_BEFORE, "the probe")
"""Keys that hold the digests of other stages."""


def stage_runs(root: Path) -> list[Run]:
    """Returns all runs of stages in a runs folder, oldest first.

    Runs recorded under former names get the digest they would have now, as do the runs that build on them.

    Args:
        root: The runs folder.
    """
    runs, digests = [], dict[str, str]()
    for run in list_runs(root)[0]:
        record = run.record
        if record.digest is None:
            continue
        decides = _on_digests(in_names_of_today(record.decides), digests)
        if decides != record.decides:
            digests[record.digest] = digest_of(decides)
            run.record = replace(record, decides=decides, digest=digests[record.digest])
        runs.append(run)
    return runs


def _on_digests(decides: Mapping[str, Any], digests: Mapping[str, str]) -> dict[str, Any]:
    def current(value: Any) -> Any:
        return [current(item) for item in value] if isinstance(value, list) else digests.get(value, value)

    return {key: current(value) if key in _ON_STAGES else value for key, value in decides.items()}
