"""Stores outputs as they are generated, so that an interrupted evaluation can be resumed."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mftctl.errors import EvaluationError
from mftctl.files.regular import read_regular


class OutputCache:
    """Outputs keyed by prompt, settings and sample number.

    Args:
        path: A JSON lines file that grows with each batch; None keeps the outputs in memory only.
        written_by: Identifies the model, so that another model's outputs are not used.
    """

    def __init__(self, path: Path | None = None, written_by: str = "") -> None:
        self._written_by = written_by
        self._path = path
        self._outputs: dict[str, str] = {}
        if path is not None and path.exists():
            self._outputs = dict(_complete_lines(path))

    def keys(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """The key of each request; equal requests are numbered, because each is a separate sample.

        Args:
            requests: Prompt and settings of each request.
        """
        seen: Counter[str] = Counter()
        keys = []
        for prompt, settings in requests:
            text = json.dumps([self._written_by, prompt, settings], sort_keys=True)
            keys.append(hashlib.sha256(f"{text}{seen[text]}".encode()).hexdigest())
            seen[text] += 1
        return keys

    def add(self, outputs: Mapping[str, str]) -> None:
        """Stores a batch of outputs.

        Args:
            outputs: Outputs by key.
        """
        self.take(outputs)
        if self._path is not None:
            # In a single write, because other processes write to the same file.
            with self._path.open("ab", buffering=0) as file:
                file.write("".join(f"{json.dumps(pair)}\n" for pair in outputs.items()).encode())

    def take(self, outputs: Mapping[str, str]) -> None:
        """Adds outputs that another process has stored.

        Args:
            outputs: Outputs by key.
        """
        self._outputs.update(outputs)

    def __contains__(self, key: str) -> bool:
        return key in self._outputs

    def __getitem__(self, key: str) -> str:
        return self._outputs[key]


def _complete_lines(path: Path) -> list[tuple[str, str]]:
    """All pairs in the file; an incomplete last line, left by a killed process, is removed.

    Raises:
        EvaluationError: Another line is damaged.
    """
    text = read_regular(path).decode()
    whole, _, rest = text.rpartition("\n")
    if rest:
        path.write_text(f"{whole}\n" if whole else "", encoding="utf-8")
    try:
        return [(str(key), str(output)) for key, output in map(json.loads, whole.split("\n") if whole else [])]
    except ValueError as error:
        raise EvaluationError(
            "The outputs of an interrupted evaluation are damaged.",
            path=path,
            expected="one pair of key and output per line",
            actual=str(error),
            hint="restart the evaluation without --resume",
        ) from error
