"""Data, encoders and listeners for tests of prepared data."""

from __future__ import annotations

import json
from pathlib import Path

from mftctl.data.encoding import Encoder
from mftctl.data.prepared.load import load_examples
from mftctl.data.prepared.records import PreparedRecords, encode_prepared
from mftctl.data.record_issues import RecordIssues
from mftctl.data.sources import DataSource
from mftctl.progress import Silence
from tests.conftest import build_tokenizer


class Notes(Silence):
    """Keeps the messages."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        """Keeps a message."""
        self.notes.append(text)


def write_questions(path: Path, count: int) -> Path:
    """Questions of different lengths, every seventh with a prompt of some 60 tokens."""
    lines = [
        json.dumps(
            {"question": f"{number}?" + " long" * (60 if number % 7 == 3 else number % 5), "answer": f"#{number}"}
        )
        for number in range(count)
    ]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def encoder() -> Encoder:
    """The encoder of the tests' tokenizer."""
    return Encoder(build_tokenizer())


def prepare(
    path: Path, *, max_length_tokens: int = 48, listener: Notes | None = None, issues: RecordIssues | None = None
) -> PreparedRecords:
    """The records of a file, prepared."""
    listener, issues = listener or Notes(), issues or RecordIssues()
    examples = load_examples([DataSource(str(path))], issues=issues, listener=listener)
    return encode_prepared(examples, encoder(), max_length_tokens, issues, listener)
