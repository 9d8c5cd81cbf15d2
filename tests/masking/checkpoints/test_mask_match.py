from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mftctl.errors import MaskMismatchError
from mftctl.masking.checkpoints.mask_match import Role, label_of, masked_tensors
from tests.masking.built_checkpoints import learn_mask, write_checkpoint

WEIGHT = torch.randn(4, 6)
DELTA = learn_mask({"w": WEIGHT}, tuned={"w": WEIGHT + 1})


@pytest.mark.parametrize("role", ["base", "tuned checkpoint"])
def test_missing_tensor_is_refused_with_the_model_that_has_it(role: Role, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", {"v": WEIGHT})
    with pytest.raises(MaskMismatchError, match=f"The {role} has no such tensor") as caught:
        masked_tensors(DELTA, folder, role)
    assert (caught.value.key, caught.value.expected) == ("w", "F32 (4, 6)")
    assert label_of(DELTA, role) in str(caught.value.hint)


@pytest.mark.parametrize("other", [WEIGHT.T.contiguous(), WEIGHT.bfloat16(), WEIGHT.int()])
@pytest.mark.parametrize("role", ["base", "tuned checkpoint"])
def test_tensor_of_another_form_is_refused(role: Role, other: torch.Tensor, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", {"w": other})
    with pytest.raises(MaskMismatchError, match=f"The {role}'s tensor differs in dtype or shape"):
        masked_tensors(DELTA, folder, role)


def test_only_the_base_of_a_delta_mask_may_have_its_embeddings_for_the_head(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", {"model.embed_tokens.weight": WEIGHT})
    delta = learn_mask({"lm_head.weight": WEIGHT}, tuned={"lm_head.weight": WEIGHT})
    assert masked_tensors(delta, folder, "base")["lm_head.weight"].name == "model.embed_tokens.weight"
    with pytest.raises(MaskMismatchError, match="tuned checkpoint has no such tensor"):
        masked_tensors(delta, folder, "tuned checkpoint")
    with pytest.raises(MaskMismatchError, match="base has no such tensor"):
        masked_tensors(learn_mask({"lm_head.weight": WEIGHT}), folder, "base")
