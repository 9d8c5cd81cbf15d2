"""Resolves the name of a model to a checkpoint folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from mftctl.data.quickstart import built_in
from mftctl.errors import ModelError
from mftctl.files.json_files import read_json_object
from mftctl.masking.checkpoints.tensors import INDEX_FILE, WEIGHTS_FILE
from mftctl.text import first_line

ADAPTER_FILE: Final = "adapter_config.json"
_WANTED_FILES: Final = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "tokenizer*", "LICENSE*", "*.py"]
_UNWANTED_FILES: Final = ["*/*.safetensors", "consolidated*", "onnx/*", "original/*"]
_LONGEST_SHOWN: Final = 200
_PICKLES: Final = ("pytorch_model*.bin", "*.pt", "*.pth")
_CONVERT: Final = (
    "if you trust its weights, convert them: "
    'AutoModelForCausalLM.from_pretrained("{model}").save_pretrained("NEW"), then copy the tokenizer files to NEW'
)


def resolve_checkpoint(model: str, revision: str | None = None, *, adapters: bool = False) -> Path:
    """The folder of a safetensors checkpoint.

    Args:
        model: A local folder, the built-in name "quickstart", or a model on the Hugging Face Hub, which is downloaded
            unless it is in the local cache.
        revision: Branch, tag or commit on the hub; ignored for the other two.
        adapters: Whether a local folder with an adapter is accepted too.

    Raises:
        ModelError: It is none of the three, or its folder lacks `config.json` or safetensors weights.
    """
    folder = Path(model).expanduser()
    try:
        is_folder, is_file = folder.is_dir(), folder.exists()
    except OSError as error:  # the name is too long
        raise ModelError("There is no such model.", key=model[:_LONGEST_SHOWN], actual=error.strerror) from error
    if is_folder:
        return folder if adapters and is_adapter(folder) else _checked(folder, model)
    if model == built_in.NAME:
        return _checked(built_in.model_path(), model)
    if is_file:
        raise ModelError(
            "A model must be a folder, but this is a file.",
            path=folder,
            expected="a folder with config.json and safetensors weights",
            hint="give the folder written by save_pretrained",
        )
    return _checked(_download(model, revision), model)


def local_folder(model: str) -> Path | None:
    """The folder of a model on this machine, whatever it holds; None for a model on the hub."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    return built_in.model_path() if model == built_in.NAME else None


def is_adapter(folder: Path) -> bool:
    """True if a folder holds an adapter and not a whole model."""
    return (folder / ADAPTER_FILE).is_file() and not (folder / "config.json").is_file()


def _download(model: str, revision: str | None) -> Path:
    try:
        folder = snapshot_download(
            model, revision=revision, allow_patterns=_WANTED_FILES, ignore_patterns=_UNWANTED_FILES
        )
    except (HFValidationError, OSError) as error:
        raise ModelError(
            "There is no such model, neither as a local folder nor on the hub.",
            key=model if revision is None else f"{model}@{revision}",
            expected='a folder, "quickstart", or a hub model such as HuggingFaceTB/SmolLM2-135M-Instruct',
            actual=first_line(error),
            hint="check the spelling and the network; for a private or gated model, log in with: hf auth login",
        ) from error
    return Path(folder)


def _checked(folder: Path, model: str) -> Path:
    if is_adapter(folder):
        raise ModelError(
            "The folder holds an adapter, but a whole model is needed.",
            path=folder,
            expected="config.json next to the weights",
            hint="train it with --merge, or write the merged model with peft",
        )
    if not (folder / "config.json").is_file():
        raise ModelError(
            "The folder is not a checkpoint: it has no config.json.",
            path=folder,
            expected="config.json next to the weights",
            hint="give the folder written by save_pretrained",
        )
    if (folder / WEIGHTS_FILE).is_file() or (folder / INDEX_FILE).is_file():
        return folder
    pickles = sorted(path for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ModelError(
            "The checkpoint is a pickle, which can run code when opened; mftctl only reads safetensors.",
            path=pickles[0],
            expected=f"{WEIGHTS_FILE} or {INDEX_FILE}",
            hint=_CONVERT.format(model=model),
        )
    raise ModelError(
        "The checkpoint has no safetensors weights.",
        path=folder,
        expected=f"{WEIGHTS_FILE} or {INDEX_FILE}",
        hint=_CONVERT.format(model=model),
    )


def adapter_base(folder: Path) -> str:
    """The base model of the adapter in a folder.

    Raises:
        ModelError: The adapter's configuration does not name it.
    """
    base = _adapter_settings(folder).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError(
            "The adapter does not name its base model.",
            path=folder / ADAPTER_FILE,
            key="base_model_name_or_path",
            expected="a folder or a hub id",
            actual=repr(base)[:_LONGEST_SHOWN],
        )
    return base


def _adapter_settings(folder: Path) -> dict[str, Any]:
    path = folder / ADAPTER_FILE
    try:
        return read_json_object(path)
    except (OSError, ValueError) as error:
        raise ModelError("The adapter's configuration cannot be read.", path=path, actual=error) from error
