"""Mask files on the Hugging Face Hub: downloaded by name, and uploaded with a card."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mftctl.errors import MaskFileError
from mftctl.text import first_line

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MASK_FILE: Final = "mask.bits"
"""Name of the mask in a repository unless another is given."""

_ON_HUB: Final = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^:@]+))?(?::(?P<file>[^:]+))?")
_LOGIN: Final = "for a private or gated repository, log in with: hf auth login"


def local_mask(name: str | Path) -> Path:
    """The mask file on this machine: the file itself, or that of a repository, downloaded unless it is in the cache.

    Args:
        name: A path, or `OWNER/NAME`, `OWNER/NAME@REVISION`, `OWNER/NAME:FILE` or `OWNER/NAME@REVISION:FILE`.

    Raises:
        MaskFileError: There is no such repository or file, or access is not granted.
    """
    path, found = Path(name).expanduser(), _ON_HUB.fullmatch(str(name))
    if found is None or path.exists() or (path.suffix in (".bits", ".delta") and ":" not in path.name):
        return path  # reported, if it is missing, by whoever opens it
    from huggingface_hub.errors import HFValidationError

    api, file = _api(), found["file"] or MASK_FILE
    try:
        return Path(api.hf_hub_download(found["repo"], file, revision=found["revision"]))
    except (OSError, HFValidationError, _connection_error()) as error:
        raise MaskFileError(
            "There is no such mask, neither as a file nor on the hub.",
            key=str(name),
            expected=f"a mask file, or OWNER/NAME[@REVISION][:FILE] with {file} in it",
            actual=first_line(error),
            hint=f"check the spelling and the network; {_LOGIN}",
        ) from error


def push_mask(file: Path, card: str, repo: str, *, private: bool) -> str:
    """Uploads a mask with its card; returns the repository's address.

    Args:
        file: The mask file.
        card: Text of its README.md.
        repo: `OWNER/NAME`.
        private: Whether a new repository is private.

    Raises:
        MaskFileError: The name is not valid, or access is not granted.
    """
    contents: dict[str, Path | bytes] = {MASK_FILE: file, "README.md": card.encode()}
    return _upload(repo, contents, private=private, message="Upload mask with mftctl")


def push_model(folder: Path, repo: str, *, private: bool) -> str:
    """Uploads a checkpoint folder with its card; returns the repository's address.

    Args:
        folder: Written by `apply`.
        repo: `OWNER/NAME`.
        private: Whether a new repository is private.

    Raises:
        MaskFileError: The name is not valid, or access is not granted.
    """
    files: dict[str, Path | bytes] = {
        path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()
    }
    return _upload(repo, files, private=private, message="Upload masked model with mftctl")


def _upload(repo: str, files: Mapping[str, Path | bytes], *, private: bool, message: str) -> str:
    """Uploads files in one commit, after creating the repository if there is none; returns its address.

    A README.md that the repository already has is kept.
    """
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.errors import HFValidationError

    api = _api()
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        kept = {"README.md"} if api.file_exists(repo, "README.md") else set()
        operations = [CommitOperationAdd(name, content) for name, content in files.items() if name not in kept]
        api.create_commit(repo, operations, commit_message=message)
    except (OSError, HFValidationError, _connection_error()) as error:
        raise MaskFileError(
            "The files could not be uploaded to the hub.",
            key=repo,
            expected="a repository OWNER/NAME that you may write to",
            actual=first_line(error),
            hint="hf auth login with a token that may write; an interrupted upload can be repeated",
        ) from error
    return str(url)


def _connection_error() -> type[Exception]:
    """Base class of the errors of the hub's HTTP client, which differs between versions."""
    from huggingface_hub.errors import HfHubHTTPError

    base: type[Exception] = HfHubHTTPError.__mro__[1]
    return base


def _api() -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(library_name="mftctl")
