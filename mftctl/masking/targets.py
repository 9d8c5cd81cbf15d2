"""Which modules of a decoder can carry a mask, and which of them a command asks for."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from mftctl.errors import MaskingError

Target = Literal["attn", "mlp", "both"]

_ATTENTION = re.compile(r"(^|[._])(attn|attention|self_attn|self_attention|cross_attn)($|[._])", re.IGNORECASE)
_MLP = re.compile(r"(^|[._])(mlp|feed_forward|ffn)($|[._])", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class MaskTarget:
    """One linear projection of a decoder layer.

    Attributes:
        name: The module's path in the model, such as `model.layers.4.mlp.up_proj`.
        layer: Index of its decoder layer.
        part: `attn` or `mlp`.
        module: The `nn.Linear` or `Conv1D` itself.
    """

    name: str
    layer: int
    part: Literal["attn", "mlp"]
    module: nn.Linear | Conv1D

    @property
    def projection(self) -> str:
        """The last part of the name, such as `up_proj`."""
        return self.name.rpartition(".")[2]


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The path and the list of the model's decoder layers.

    The decoder is the longest `nn.ModuleList` whose entries are all of one class and hold linear projections.

    Raises:
        MaskingError: The model has no such list.
    """
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len({type(layer) for layer in module}) == 1
        and any(isinstance(part, nn.Linear | Conv1D) for part in module.modules())
    ]
    if not lists:
        raise MaskingError(
            "This model has no list of decoder layers to mask.",
            expected="a decoder such as Llama, Qwen, Mistral, Gemma, Phi or GPT-2",
            actual=type(model).__name__,
        )
    return max(lists, key=lambda item: (len(item[1]), -len(item[0])))


def find_targets(
    model: nn.Module,
    layers: Sequence[int] | None = None,
    target: Target = "both",
    projections: Collection[str] | None = None,
) -> list[MaskTarget]:
    """The projections of the chosen layers, in model order; embeddings, norms and the output head are never among them.

    Args:
        model: A decoder-only model.
        layers: Indices of decoder layers; None takes all.
        target: `attn`, `mlp` or `both`.
        projections: Only projections of these names, such as `q_proj`; None takes all.

    Raises:
        MaskingError: The model has no decoder layers, nothing matches, or a projection of that name is not there.

    Source: MFT, section 3.1 (attention and MLP projections).
    """
    prefix, decoder = decoder_layers(model)
    wanted = range(len(decoder)) if layers is None else layers
    found = [
        MaskTarget(f"{prefix}.{index}.{name}", index, part, module)
        for index in wanted
        for name, module in decoder[index].named_modules()
        if isinstance(module, nn.Linear | Conv1D) and (part := _part(name)) is not None and target in (part, "both")
    ]
    if not found:
        raise MaskingError(
            "No projection matches.",
            key="target",
            expected="attention or MLP projections (nn.Linear or Conv1D)",
            actual=f"target {target} in a decoder of {type(decoder[0]).__name__}",
        )
    if projections is None:
        return found
    known = {item.projection for item in found}
    for name in projections:
        if name not in known:
            raise MaskingError(
                "The chosen layers have no projection of that name.",
                key="ratio",
                expected=", ".join(sorted(known)),
                actual=name,
            )
    return [item for item in found if item.projection in projections]


def parse_layers(text: str, layer_count: int) -> list[int]:
    """The sorted layer indices that a choice such as `4-7`, `0,3,8-11` or `all` names.

    Args:
        text: The choice, both ends of a range included.
        layer_count: Number of decoder layers of the model.

    Raises:
        MaskingError: The text is no such choice, or names a layer that the model does not have.
    """
    if text.strip() == "all":
        return list(range(layer_count))
    chosen: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise MaskingError(
                "Layers are numbers and ranges.", key="layers", expected='"4-7", "0,3,8-11" or "all"', actual=text
            )
        chosen.update(range(first, last + 1))
    if max(chosen) >= layer_count:
        raise MaskingError(
            "The model does not have that many layers.",
            key="layers",
            expected=f"layers 0 to {layer_count - 1}",
            actual=text,
        )
    return sorted(chosen)


def format_layers(layers: Sequence[int]) -> str:
    """The shortest choice that `parse_layers` reads back, such as `0,3,8-11`."""
    ranges: list[list[int]] = []
    for layer in sorted(set(layers)):
        if ranges and layer == ranges[-1][1] + 1:
            ranges[-1][1] = layer
        else:
            ranges.append([layer, layer])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def layer_groups(
    layer_count: int, sizes: Sequence[int | Literal["all"]], layers: Sequence[int] | None = None
) -> list[list[int]]:
    """Consecutive groups of decoder layers of each size, in order; the last of a size may be smaller.

    Args:
        layer_count: Number of decoder layers.
        sizes: Layers a group, at least 1, or `all`. A group that two sizes have in common comes once.
        layers: Only these layers are grouped; None takes all.

    Raises:
        MaskingError: A size is not between 1 and the number of layers.

    Source: MFT, section 3.2 (groups of 4, also 8, and 16 in the appendix). All layers beside them is ours.
    """
    wanted = list(range(layer_count)) if layers is None else sorted(set(layers))
    groups: list[list[int]] = []
    for size in sizes:
        count = layer_count if size == "all" else size
        if not 1 <= count <= layer_count:
            raise MaskingError(
                "A group cannot have that many layers.",
                key="groups",
                expected=f"1 to {layer_count}, or all",
                actual=size,
            )
        found = [wanted[start : start + count] for start in range(0, len(wanted), count)]
        groups += [group for group in found if group not in groups]
    return groups


def _part(name: str) -> Literal["attn", "mlp"] | None:
    """Whether a projection's path inside its layer says attention or MLP; None for anything else, such as routers."""
    if _ATTENTION.search(name):
        return "attn"
    return "mlp" if _MLP.search(name) else None
