"""Models between two checkpoints, in memory and on disk."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mftctl.errors import MaskMismatchError, ModelError, OutputError
from mftctl.masking.checkpoints.interpolate import (
    changed_tensors,
    go_to,
    parameters_of,
    weights_of,
    write_interpolated,
)
from tests.checkpoint_kinds import in_8_bits, with_weights
from tests.conftest import build_llama
from tests.masking.built_checkpoints import raw_tensors, stored_tensors, write_checkpoint, write_tuned
from tests.masking.combined_numpy import combined

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
CHANGED = ("model.layers.1.mlp.up_proj.weight", "model.norm.weight")


@pytest.fixture
def base(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_checkpoint, tmp_path / "base")


@pytest.fixture
def tuned(base: Path, tmp_path: Path) -> Path:
    """A checkpoint in which two tensors differ from the base's."""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor + 0.25 * (name in CHANGED) for name, tensor in tensors.items()}

    return with_weights(base, tmp_path / "tuned", change)


def write(share: float, base: Path, tuned: Path, output: Path, *, replace: bool = False) -> None:
    write_interpolated(
        share, changed_tensors(base, tuned), base, tuned, output, card="# Card\n", replace=replace, origin=None
    )


def raw_of(folder: Path) -> dict[str, bytes]:
    return {name: raw for path in folder.glob("*.safetensors") for name, raw in raw_tensors(path).items()}


def test_only_changed_tensors_are_found(base: Path, tuned: Path) -> None:
    assert [pair.name for pair in changed_tensors(base, tuned)] == sorted(CHANGED)


def test_a_change_of_sign_of_zero_is_a_change(tmp_path: Path) -> None:
    folders = [write_checkpoint(tmp_path / str(n), {"w": torch.tensor([0.0 * (-1) ** n, 1.0])}) for n in range(2)]
    for folder in folders:
        (folder / "config.json").write_text("{}")
    assert [pair.name for pair in changed_tensors(*folders)] == ["w"]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0, 1.2, -0.5])
def test_the_written_model_is_the_weighted_sum(share: float, base: Path, tuned: Path, tmp_path: Path) -> None:
    write(share, base, tuned, tmp_path / "out")
    before, after, found = raw_of(base), raw_of(tuned), raw_of(tmp_path / "out")
    for name in after:
        expected = combined([before[name], after[name]], (1 - share, share), "F32") if name in CHANGED else after[name]
        assert found[name] == expected


@pytest.mark.parametrize("shards", [1, 3])
def test_share_1_is_the_tuned_model_and_share_0_the_base_bit_for_bit(shards: int, base: Path, tmp_path: Path) -> None:
    tuned = write_tuned(base, tmp_path / "tuned", shards=shards)
    tensors = stored_tensors(tuned)
    write(1.0, base, tuned, tmp_path / "one")
    write(0.0, base, tuned, tmp_path / "none")
    assert {path.name for path in (tmp_path / "one").glob("*.safetensors")} == {
        path.name for path in tuned.glob("*.safetensors")
    }
    assert raw_of(tmp_path / "one") == raw_of(tuned)
    assert raw_of(tmp_path / "none") == raw_of(base)
    assert tensors.keys() == stored_tensors(tmp_path / "one").keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_in_memory_is_the_one_that_is_written(dtype: torch.dtype, tmp_path: Path) -> None:
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    build_llama(layers=2).to(dtype).save_pretrained(base)
    write_tuned(base, tuned)
    pairs = changed_tensors(base, tuned)
    model = AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32)
    parameters = parameters_of(model, pairs)
    for number, share in enumerate((0.3, 1.2, 1.0, 0.0)):
        go_to(share, parameters, pairs)
        write(share, base, tuned, tmp_path / str(number))
        written = AutoModelForCausalLM.from_pretrained(tmp_path / str(number), dtype=torch.float32)
        for name, parameter in written.state_dict().items():
            assert torch.equal(model.state_dict()[name], parameter), (share, name)


def test_files_are_those_of_the_tuned_model(base: Path, tuned: Path, tmp_path: Path) -> None:
    (tuned / "chat_template.jinja").write_text("of the tuned model")
    write(0.5, base, tuned, tmp_path / "out")
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (tuned / name).read_bytes()
    assert (tmp_path / "out" / "README.md").read_text() == "# Card\n"


def test_a_head_that_the_base_ties_starts_from_its_embeddings(tmp_path: Path) -> None:
    embeddings, head, tuned_embeddings = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(0)).unbind()
    base = write_checkpoint(tmp_path / "base", {EMBEDDINGS: embeddings.clone()})
    tuned = write_checkpoint(tmp_path / "tuned", {EMBEDDINGS: tuned_embeddings.clone(), HEAD: head.clone()})
    for folder in (base, tuned):
        (folder / "config.json").write_text("{}")
    write(0.25, base, tuned, tmp_path / "out")
    found = stored_tensors(tmp_path / "out")
    assert torch.equal(found[HEAD], 0.75 * embeddings + 0.25 * head)
    assert torch.equal(found[EMBEDDINGS], 0.75 * embeddings + 0.25 * tuned_embeddings)


def test_models_of_other_shapes_are_refused(base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    build_llama(hidden_size=64).save_pretrained(other)
    with pytest.raises(MaskMismatchError, match="do not have the same tensors") as caught:
        changed_tensors(base, other)
    assert caught.value.expected is not None
    assert str(caught.value.expected).endswith(f"as in the base {base}")


def test_models_of_the_same_weights_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="same weights") as caught:
        changed_tensors(base, shutil.copytree(base, tmp_path / "copy"))
    assert caught.value.path == str(tmp_path / "copy")


@pytest.mark.parametrize("which", ["base", "tuned"])
def test_a_quantised_model_is_refused(which: str, base: Path, tuned: Path, tmp_path: Path) -> None:
    folders = {"base": base, "tuned": tuned}
    folders[which] = in_8_bits(folders[which], tmp_path / "fp8")
    with pytest.raises(ModelError, match="quantised"):
        changed_tensors(**folders)


def test_a_changed_tensor_outside_the_model_is_refused(base: Path, tuned: Path, llama: torch.nn.Module) -> None:
    def renamed(folder: Path) -> Path:
        return with_weights(
            folder,
            folder.with_name(f"{folder.name}-more"),
            lambda tensors: {**tensors, "vision.w": torch.full((2,), float(len(folder.name)))},
        )

    pairs = changed_tensors(renamed(base), renamed(tuned))
    with pytest.raises(ModelError, match="language model does not use") as caught:
        parameters_of(llama, pairs)  # type: ignore[arg-type]
    assert caught.value.key == "vision.w"


@pytest.mark.parametrize("place", ["base", "tuned/out", "."])
def test_an_output_that_overlaps_a_model_is_refused(place: str, base: Path, tuned: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ModelError, match="output folder"):
        write(0.5, base, tuned, tmp_path / place, replace=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_is_replaced_only_if_agreed(base: Path, tuned: Path, tmp_path: Path) -> None:
    write(0.5, base, tuned, tmp_path / "out")
    with pytest.raises(OutputError, match="result already exists"):
        write(1.0, base, tuned, tmp_path / "out")
    write(1.0, base, tuned, tmp_path / "out", replace=True)
    assert raw_of(tmp_path / "out") == raw_of(tuned)


def test_weights_sum_to_1() -> None:
    assert weights_of(1.0) == (0.0, 1.0)
    assert weights_of(1.25) == (-0.25, 1.25)
