"""Saving an adapter without a request to the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

if TYPE_CHECKING:
    from peft import PeftModel


@contextmanager
def without_lookup(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Saves a model in this context without a request to the Hugging Face Hub.

    By default, peft looks up an adapter's base there at each save, to find out whether the vocabulary was resized,
    which mftctl never does. A local name such as `quickstart` can be another model's there.

    Args:
        model: The model that will be saved; one without an adapter is saved as usual.
    """
    if isinstance(model, PreTrainedModel):
        yield
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.constants import EMBEDDING_LAYER_NAMES

    are_adapted = any(
        isinstance(module, BaseTunerLayer) and name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES
        for name, module in model.named_modules()
    )
    save = partial(model.save_pretrained, save_embedding_layers=are_adapted)
    model.save_pretrained = save  # type: ignore[method-assign] # the Trainer offers no argument for it
    try:
        yield
    finally:
        del model.save_pretrained
