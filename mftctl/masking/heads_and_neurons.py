"""Attention heads and MLP neurons: which weights belong to each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import nn

from mftctl.errors import MaskingError
from mftctl.masking.targets import MaskTarget

_QUERIES: Final = ("q_proj",)
_KEYS_AND_VALUES: Final = ("k_proj", "v_proj")
_OUTPUTS: Final = ("o_proj", "out_proj", "dense")
_INTO_NEURONS: Final = ("gate_proj", "up_proj", "fc1", "c_fc", "dense_h_to_4h")
_OUT_OF_NEURONS: Final = ("down_proj", "fc2", "c_proj", "dense_4h_to_h")


class Units(Protocol):
    """The heads or neurons of a model."""

    def count(self, layer: int) -> int:
        """The number of them in a decoder layer."""

    def sums(self, target: MaskTarget, values: torch.Tensor) -> torch.Tensor:
        """The sum of a projection's values over the weights of each of them.

        Args:
            target: A projection that the units were made of.
            values: Of the shape of its weight.

        Returns:
            fp64 tensor of shape `(count,)` on the CPU.
        """


@dataclass(frozen=True, slots=True)
class Heads:
    """The attention heads of a model with separate projections for queries, keys, values and outputs.

    A head has its rows of queries, keys and values and its columns of the output projection. With grouped-query
    attention, several heads share rows of keys and values; each has an equal part of their sum.

    Attributes:
        heads: Number of heads.
        shared: Number of heads with the same keys and values.
    """

    heads: int
    shared: int

    def count(self, layer: int) -> int:
        """The number of heads, which is the same in every layer."""
        return self.heads

    def sums(self, target: MaskTarget, values: torch.Tensor) -> torch.Tensor:
        """The sum over each head's weights; see `Units`."""
        if target.projection in _KEYS_AND_VALUES:
            groups = _sums(values, self.heads // self.shared, _outputs_dim(target))
            return groups.repeat_interleave(self.shared) / self.shared
        return _sums(values, self.heads, target.inputs_dim if target.projection in _OUTPUTS else _outputs_dim(target))


@dataclass(frozen=True, slots=True)
class Neurons:
    """The MLP neurons of a model with separate projections.

    A neuron has its rows of the projections into the hidden units and its column of the one out of them.

    Attributes:
        counts: Number of neurons by decoder layer.
    """

    counts: Mapping[int, int]

    def count(self, layer: int) -> int:
        """The number of neurons in a layer."""
        return self.counts[layer]

    def sums(self, target: MaskTarget, values: torch.Tensor) -> torch.Tensor:
        """The sum over each neuron's weights; see `Units`."""
        is_output = target.projection in _OUT_OF_NEURONS
        return _sums(values, self.counts[target.layer], target.inputs_dim if is_output else _outputs_dim(target))


def heads_of(model: nn.Module, targets: Sequence[MaskTarget]) -> Heads:
    """The attention heads of a model.

    Args:
        model: Its configuration provides the number of heads.
        targets: The attention projections whose weights are told apart.

    Raises:
        MaskingError: The configuration names no number of heads, or a projection is fused or of another shape.
    """
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    heads = getattr(config, "num_attention_heads", None)
    shared_heads = getattr(config, "num_key_value_heads", None) or heads
    if not isinstance(heads, int) or not isinstance(shared_heads, int) or heads % shared_heads:
        raise MaskingError(
            "The attention heads of this model are not known.",
            key="num_attention_heads",
            expected="one number of heads, a multiple of the number of key-value heads, in the configuration",
            actual=f"{heads} and {shared_heads}",
        )
    known = (*_QUERIES, *_KEYS_AND_VALUES, *_OUTPUTS)
    parents: dict[int, str] = {}
    for target in targets:
        if target.projection not in known or target.fused is not None:
            raise _not_separate(target, "attention heads", known)
        _require_one_parent(target, parents)
        dimension = target.inputs_dim if target.projection in _OUTPUTS else _outputs_dim(target)
        parts = shared_heads if target.projection in _KEYS_AND_VALUES else heads
        if target.weight.shape[dimension] % parts:
            raise MaskingError(
                "A projection does not divide into attention heads.",
                key=target.name,
                expected=f"a multiple of {parts} in dimension {dimension}",
                actual=tuple(target.weight.shape),
            )
    return Heads(heads, heads // shared_heads)


def neurons_of(targets: Sequence[MaskTarget]) -> Neurons:
    """The MLP neurons of a model.

    Args:
        targets: The MLP projections whose weights are told apart.

    Raises:
        MaskingError: A projection is fused or has another shape, or a layer has several MLPs.
    """
    known = (*_INTO_NEURONS, *_OUT_OF_NEURONS)
    counts: dict[int, int] = {}
    parents: dict[int, str] = {}
    for target in targets:
        if target.projection not in known or target.fused is not None:
            raise _not_separate(target, "neurons", known)
        _require_one_parent(target, parents)
        dimension = target.inputs_dim if target.projection in _OUT_OF_NEURONS else _outputs_dim(target)
        neurons = target.weight.shape[dimension]
        if counts.setdefault(target.layer, neurons) != neurons:
            raise MaskingError(
                "The projections of an MLP have different numbers of neurons.",
                key=target.name,
                expected=f"{counts[target.layer]} neurons",
                actual=tuple(target.weight.shape),
            )
    return Neurons(counts)


def _require_one_parent(target: MaskTarget, parents: dict[int, str]) -> None:
    """Refuses a layer with several attentions or MLPs; notes the module of each layer."""
    parent = target.name.rpartition(".")[0]
    if parents.setdefault(target.layer, parent) != parent:
        raise MaskingError(
            "A layer has several modules whose heads or neurons would be counted together.",
            key=target.name,
            expected=f"projections of {parents[target.layer]} only",
            actual=f"also of {parent}",
            hint="mftctl probe --fast --unit projection",
        )


def _not_separate(target: MaskTarget, units: str, known: Sequence[str]) -> MaskingError:
    return MaskingError(
        f"The weights of this tensor cannot be assigned to {units}.",
        key=target.name,
        expected=f"a separate projection: {', '.join(known)}",
        actual=f"fused weights of shape {tuple(target.weight.shape)}",
        hint="mftctl probe --fast --unit projection",
    )


def _outputs_dim(target: MaskTarget) -> int:
    return -1 if target.inputs_dim == -2 else -2


def _sums(values: torch.Tensor, parts: int, dimension: int) -> torch.Tensor:
    """The sums of equal consecutive parts along a dimension of a matrix; fp64 on the CPU, which every device has."""
    rows = values.movedim(dimension, 0).cpu() if values.device.type == "mps" else values.movedim(dimension, 0)
    return rows.sum(1, dtype=torch.float64).view(parts, -1).sum(1).cpu()
