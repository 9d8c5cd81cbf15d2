"""What training supports with images, and what of a vision-language model training reaches."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from mftctl.data.batching import any_images
from mftctl.data.encoding import Encoded
from mftctl.errors import ConfigError
from mftctl.experiments.mask_train_options import MaskTrainOptions
from mftctl.masking.towers import beside_language_model
from mftctl.progress import Listener
from mftctl.runtime.processes import spreads_parameters, world_size


def require_whole_weights(records: Sequence[Encoded]) -> None:
    """Checks that processes that share a training with images do not share its parameters as well.

    With DeepSpeed and FSDP, all processes must reach the same modules at the same time. A batch of text does not reach
    the vision tower.

    Args:
        records: Training records.

    Raises:
        ConfigError: They share the parameters or the state of the optimizer.
    """
    if any_images(records) and world_size() > 1 and spreads_parameters():
        raise ConfigError(
            "Training with images runs in one process, or under DDP.",
            key="data",
            expected="--shard ddp, one process, or data without images",
            actual=f"{world_size()} processes under DeepSpeed or FSDP",
            hint="--shard ddp, with --low-memory if it does not fit",
        )


def require_text(records: Sequence[Encoded], what: str, key: str) -> None:
    """Checks that data of which only the text can be used has no images.

    Args:
        records: The records.
        what: The data, for the error.
        key: Its option or recipe key, for the error.

    Raises:
        ConfigError: It has images.
    """
    if any_images(records):
        raise ConfigError(f"{what} cannot have images.", key=key, expected="records of text", actual="images")


def require_images_for_projector(options: MaskTrainOptions, train: Sequence[Encoded]) -> None:
    """Checks that the data reaches a projector whose mask is learned.

    Args:
        options: Options of mask training.
        train: Training records.

    Raises:
        ConfigError: It has no images.
    """
    estimates = options.method == "learned" or options.shared_budget is not None
    if options.target in ("projector", "all") and estimates and not any_images(train):
        raise ConfigError(
            "A mask of the projector is learned from images.",
            key="mask_train.target",
            expected="attn, mlp or both, or records with images",
            actual=f"{options.target} without images in the data",
        )


def first_reusing_layer(layers: Sequence[int], records: Sequence[Encoded], listener: Listener) -> int:
    """The decoder layer below which hidden states are reused; 0 if they are not.

    Args:
        layers: The masked layers.
        records: Training records.
        listener: Told if images prevent it.
    """
    lowest = max(min(layers), 0)
    if lowest and any_images(records):
        listener.note("Hidden states are not reused: they depend on the images of a batch as well as on its tokens.")
        return 0
    return lowest


def freeze_unreached(model: PreTrainedModel, records: Sequence[Encoded]) -> None:
    """Freezes what data without images does not reach: the vision tower and the projector.

    Args:
        model: The model to train.
        records: Training records.
    """
    if not any_images(records):
        for parameter in beside_language_model(model):
            parameter.requires_grad_(False)
