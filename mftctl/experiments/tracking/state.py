"""What a run folder remembers of its run in one tracker, for when it is resumed."""

from __future__ import annotations

import json
from pathlib import Path


class TrackerState:
    """The content of `tracking/<tracker>.json`.

    Attributes:
        identifier: The identifier of the run in the tracker; None before it is tracked there.
        sent: The number of lines of `metrics.jsonl` that the tracker has, by training; the run's own is empty.

    Args:
        folder: The run folder.
        tracker: The name of the tracker.
    """

    def __init__(self, folder: Path, tracker: str) -> None:
        self._path = folder / "tracking" / f"{tracker}.json"
        self.identifier: str | None = None
        self.sent: dict[str, int] = {}
        if self._path.exists():
            document = json.loads(self._path.read_text(encoding="utf-8"))
            self.identifier, self.sent = document["id"], document["sent"]

    def identify(self, identifier: str) -> str:
        """Stores the identifier and returns it."""
        self.identifier = identifier
        self.save()
        return identifier

    def save(self) -> None:
        """Replaces the file; called for each line, so it does not wait for the disk."""
        self._path.parent.mkdir(exist_ok=True)
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"id": self.identifier, "sent": self.sent}) + "\n", encoding="utf-8")
        temporary.replace(self._path)
