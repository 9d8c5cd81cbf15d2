"""Masks and masked models on a stand-in of the hub on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants

from mftctl.masking.hub_masks import local_mask
from tests.cli.running import CommandLine
from tests.masking.hub_server import TOKEN, Hub, running_hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with running_hub() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants._HF_DEFAULT_ENDPOINT, found.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


@pytest.fixture
def masked(mftctl: CommandLine, workspace: Path) -> CommandLine:
    """A folder with a learned mask and its run."""
    data = ("-d", workspace / "train.jsonl", "--val-data", workspace / "val.jsonl")
    settings = ("--max-steps", 4, "--val-steps", 2, "--batch-size", 4, "--layers", "1-2", "--ratio", 0.2)
    outcome = mftctl("mask-train", "-m", workspace / "tiny", *data, *settings, "-o", "mask.bits")
    assert outcome.code == 0, outcome.stderr
    return mftctl


@pytest.mark.slow
def test_a_mask_goes_to_the_hub_and_back(hub: Hub, masked: CommandLine, workspace: Path) -> None:
    pushed = masked("mask", "push", "mask.bits", "me/my-mask", "--private", "--json")
    assert pushed.code == 0, pushed.stderr
    assert json.loads(pushed.stdout)["url"] == f"{hub.url}/me/my-mask"
    assert hub.private == {"me/my-mask"}
    files = hub.repositories["me/my-mask"]
    assert files["mask.bits"] == (masked.folder / "mask.bits").read_bytes()
    card = files["README.md"].decode()
    assert ModelCard(card).data.tags == ["mask-fine-tuning", "mftctl"]
    for part in (
        "mftctl apply MODEL me/my-mask",
        "train.jsonl",
        "paired 95 % interval",
        "mftctl mask-train",
        "# license:",
    ):
        assert part in card
    assert str(workspace) not in card.partition("Command")[0]
    assert TOKEN not in pushed.stdout + pushed.stderr + card
    names = ["me/my-mask", "me/my-mask@main", f"me/my-mask@{hub.revision('me/my-mask')}:mask.bits"]
    infos = [json.loads(masked("mask", "info", name, "--json").stdout)["removed"] for name in names]
    assert len(set(infos)) == 1
    assert masked("mask", "diff", "me/my-mask", "mask.bits").code == 0
    applied = masked("apply", workspace / "tiny", "me/my-mask", "-o", "better", "--push", "me/better")
    assert applied.code == 0, applied.stderr
    assert {"model.safetensors", "config.json", "README.md", "mftctl.json"} <= hub.repositories["me/better"].keys()
    assert "me/better" not in hub.private
    measured = masked(
        "eval", workspace / "tiny", "--mask", "me/my-mask", "-d", workspace / "test.jsonl", "--no-generate"
    )
    assert measured.code == 0, measured.stderr
    assert not any(TOKEN.encode() in path.read_bytes() for path in (masked.folder / "runs").rglob("*.json"))


@pytest.mark.slow
def test_a_card_that_was_edited_is_kept(hub: Hub, masked: CommandLine) -> None:
    assert masked("mask", "push", "mask.bits", "me/my-mask").code == 0
    hub.repositories["me/my-mask"]["README.md"] = b"mine"
    assert masked("mask", "push", "mask.bits", "me/my-mask").code == 0
    assert hub.repositories["me/my-mask"]["README.md"] == b"mine"
    assert hub.commits == 2


@pytest.mark.slow
def test_without_a_token(hub: Hub, masked: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert masked("mask", "push", "mask.bits", "me/secret", "--private").code == 0
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    for command in (("mask", "push", "mask.bits", "me/other"), ("mask", "info", "me/secret")):
        outcome = masked(*command)
        assert outcome.code == 1
        assert "hf auth login" in outcome.stderr
        assert "hf_other" not in outcome.stderr


def test_what_is_not_there(hub: Hub, mftctl: CommandLine) -> None:
    hub.repositories["me/empty"] = {}
    for name in ("me/none", "me/empty", "me/empty@v2", "me/empty:other.bits"):
        outcome = mftctl("mask", "info", name)
        assert outcome.code == 1
        assert "neither as a file nor on the hub" in outcome.stderr
        assert name in outcome.stderr


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached(hub: Hub, masked: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    outcome = masked("mask", "push", "mask.bits", "me/my-mask")
    assert outcome.code == 1
    assert "could not be uploaded" in outcome.stderr
    assert (masked.folder / "mask.bits").is_file()


@pytest.mark.parametrize("name", ["runs/001/mask.bits", "mask.bits", "../masks/a.bits", "/tmp/x/y"])
def test_paths_are_not_looked_up(name: str) -> None:
    assert local_mask(name) == Path(name)
    assert local_mask(name.replace(".bits", ".delta")) == Path(name.replace(".bits", ".delta"))


def test_private_without_a_repository_to_push_to(mftctl: CommandLine) -> None:
    outcome = mftctl("apply", "model", "mask.bits", "--private")
    assert outcome.code == 2
    assert "--push OWNER/NAME" in outcome.stderr
