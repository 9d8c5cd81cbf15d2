"""Modules of a decoder that can carry a mask, and selection of those to mask."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from mftctl.errors import MaskingError
from mftctl.masking.parameter_layout import StoredPart, stored_parts
from mftctl.masking.towers import outside_decoder, projector_modules

Target = Literal["attn", "mlp", "both", "projector", "all"]
Part = Literal["attn", "mlp", "projector"]

PROJECTOR_LAYER: Final = -1
"""The layer of a projector's modules: below the first decoder layer, which sees its output."""

_ATTENTION = re.compile(r"(^|[._])(attn|attention|self_attn|self_attention|cross_attn)($|[._])", re.IGNORECASE)
_MLP = re.compile(r"(^|[._])(mlp|feed_forward|ffn)($|[._])", re.IGNORECASE)
_EXPERTS = re.compile(r"(^|\.)experts($|\.)")
_ROUTER = re.compile(r"(^|\.)router($|\.)")
_GATE = re.compile(r"(^|[._])gate$")
_FUSED_DIMENSIONS = 3


@dataclass(frozen=True, slots=True)
class MaskTarget:
    """One projection to mask: a module of a decoder layer or of a projector, or one stored tensor of fused experts.

    Attributes:
        name: The module's path in the model, such as `model.layers.4.mlp.up_proj`; for experts, the name of the stored
            tensor without `.weight`, such as `model.layers.4.mlp.experts.7.up_proj`.
        layer: Index of its decoder layer; `PROJECTOR_LAYER` for a module of the projector.
        part: `attn`, `mlp` or `projector`.
        module: The `nn.Linear` or `Conv1D` itself, or the module that contains the experts.
        fused: For experts, the part of a parameter that it is; None for a separate module.
    """

    name: str
    layer: int
    part: Part
    module: nn.Module
    fused: StoredPart | None = None

    @property
    def projection(self) -> str:
        """The last part of the name, such as `up_proj`."""
        return self.name.rpartition(".")[2]

    @property
    def module_name(self) -> str:
        """The module's path in the model."""
        return self.name if self.fused is None else self.fused.parameter.rpartition(".")[0]

    @property
    def parameter(self) -> str:
        """The name of the parameter in its module."""
        return "weight" if self.fused is None else self.fused.parameter.rpartition(".")[2]

    @property
    def weight(self) -> torch.Tensor:
        """The weight as stored: the parameter, or a view of a part of it."""
        return self.part_of(self.module.get_parameter(self.parameter))

    @property
    def weight_name(self) -> str:
        """The name of the parameter in memory, or for experts the name of the stored tensor."""
        return f"{self.name}.weight" if self.fused is None else self.fused.name

    @property
    def inputs_dim(self) -> int:
        """The input dimension of the weight, -1 or -2."""
        transposed = isinstance(self.module, Conv1D) or bool(getattr(self.module, "is_transposed", False))
        return -2 if transposed else -1

    @property
    def fan_in(self) -> int:
        """The number of inputs per output."""
        return self.weight.shape[self.inputs_dim]

    def part_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """A view of this projection's part of a tensor of the parameter's shape."""
        return tensor if self.fused is None else self.fused.of(tensor)


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The path and the list of the model's decoder layers.

    The decoder is the longest `nn.ModuleList` whose entries all have the same class and contain linear projections; of
    a model with several towers, the longest within its language model, never one of its vision or audio tower.

    Raises:
        MaskingError: The model has no such list.
    """
    outside = outside_decoder(model)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and module not in outside
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
    """The projections of the chosen layers, in model order.

    Embeddings, norms, the output head, expert routers and a vision tower are never included. With fused experts, each
    stored tensor is one projection.

    Args:
        model: A decoder-only model, or one with a vision tower.
        layers: Indices of decoder layers; None selects all. They do not affect the projector.
        target: `attn`, `mlp` or `both` of the decoder layers, the `projector` behind a vision tower, or `all` of these.
        projections: Only projections with these names, such as `q_proj`; None selects all.

    Raises:
        MaskingError: The model has no decoder layers or no projector, nothing matches, a projection name does not
            exist, or experts are fused in an unsupported form.

    Source: MFT, section 3.1 (attention and MLP projections).
    """
    found = [] if target == "projector" else _decoder_targets(model, layers, target)
    if target in ("projector", "all"):
        found = [*_projector_targets(model), *found]
    if projections is None:
        return found
    known = {item.projection for item in found}
    for name in projections:
        if name not in known:
            raise MaskingError(
                "The chosen layers have no projection with that name.",
                key="ratio",
                expected=", ".join(sorted(known)),
                actual=name,
            )
    return [item for item in found if item.projection in projections]


def _decoder_targets(model: nn.Module, layers: Sequence[int] | None, target: Target) -> list[MaskTarget]:
    prefix, decoder = decoder_layers(model)
    wanted = range(len(decoder)) if layers is None else [layer for layer in layers if layer != PROJECTOR_LAYER]
    modules = [
        (f"{prefix}.{index}.{name}", index, part, module)
        for index in wanted
        for name, part, module in _projections(decoder[index])
        if target in (part, "both", "all")
    ]
    experts = _expert_parts(model, [(name, module) for name, _, _, module in modules if not _is_linear(module)])
    found = []
    for name, index, part, module in modules:
        if _is_linear(module):
            found.append(MaskTarget(name, index, part, module))
        for fused in experts.get(name, []):
            found.append(MaskTarget(fused.name.removesuffix(".weight"), index, part, module, fused))
    if not found:
        raise _no_projection(decoder, f"target {target}")
    return found


def _projector_targets(model: nn.Module) -> list[MaskTarget]:
    found = [MaskTarget(name, PROJECTOR_LAYER, "projector", module) for name, module in projector_modules(model)]
    if not found:
        raise MaskingError(
            "This model has no projector to mask.",
            key="target",
            expected="a vision-language model with linear projections between vision tower and language model",
            actual=type(model).__name__,
            hint="--target both",
        )
    return found


def parse_layers(text: str, layer_count: int) -> list[int]:
    """The sorted layer indices of a choice such as `4-7`, `0,3,8-11` or `all`.

    Args:
        text: The choice; ranges include both ends.
        layer_count: Number of decoder layers of the model.

    Raises:
        MaskingError: The text is not a valid choice, or names a layer that the model does not have.
    """
    if text.strip() == "all":
        return list(range(layer_count))
    chosen: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise MaskingError(
                "Layers must be numbers and ranges.", key="layers", expected='"4-7", "0,3,8-11" or "all"', actual=text
            )
        if last >= layer_count:
            raise MaskingError(
                "The model does not have that many layers.",
                key="layers",
                expected=f"layers 0 to {layer_count - 1}",
                actual=text,
            )
        chosen.update(range(first, last + 1))
    return sorted(chosen)


def masked_layer_indices(text: str, layer_count: int, target: Target) -> list[int]:
    """The sorted indices of the masked decoder layers, with `PROJECTOR_LAYER` first if the target has the projector.

    Args:
        text: The choice of decoder layers, as for `parse_layers`.
        layer_count: Number of decoder layers of the model.
        target: Projections to mask.

    Raises:
        MaskingError: As for `parse_layers`, or decoder layers are chosen although only the projector is masked.
    """
    if target == "projector":
        if text.strip() != "all":
            raise MaskingError(
                "The projector belongs to no decoder layer.",
                key="layers",
                expected="no choice of layers",
                actual=text,
                hint="omit --layers, or use --target all for the projector and these layers",
            )
        return [PROJECTOR_LAYER]
    chosen = parse_layers(text, layer_count)
    return [PROJECTOR_LAYER, *chosen] if target == "all" else chosen


def format_layers(layers: Sequence[int]) -> str:
    """The shortest choice that `parse_layers` parses to these layers, such as `0,3,8-11`; `projector` comes first."""
    if PROJECTOR_LAYER in layers:
        others = format_layers([layer for layer in layers if layer != PROJECTOR_LAYER])
        return f"projector,{others}" if others else "projector"
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
    """Consecutive groups of decoder layers for each size, in order; the last group of a size may be smaller.

    Args:
        layer_count: Number of decoder layers.
        sizes: Layers per group, at least 1, or `all`. A group that occurs for two sizes is included once.
        layers: Only these layers are grouped; None selects all.

    Raises:
        MaskingError: A size is not between 1 and the number of layers.

    Source: MFT, section 3.2 (groups of 4, also 8, and 16 in the appendix). The group of all layers is ours.
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


def linear_projections(model: nn.Module) -> list[tuple[str, nn.Linear | Conv1D]]:
    """Path and module of all attention and MLP projections that are separate modules.

    Raises:
        MaskingError: The model has no decoder layers, or they contain no such projections.
    """
    prefix, decoder = decoder_layers(model)
    found = [
        (f"{prefix}.{index}.{name}", module)
        for index, layer in enumerate(decoder)
        for name, _, module in _projections(layer)
        if isinstance(module, nn.Linear | Conv1D)
    ]
    if not found:
        raise _no_projection(decoder, "none")
    return found


def _no_projection(decoder: nn.ModuleList, wanted: str) -> MaskingError:
    return MaskingError(
        "No projection matches.",
        key="target",
        expected="attention or MLP projections (nn.Linear, Conv1D or fused experts)",
        actual=f"{wanted} in a decoder of {type(decoder[0]).__name__}",
    )


def _projections(layer: nn.Module) -> Iterator[tuple[str, Literal["attn", "mlp"], nn.Module]]:
    """Yields path, part and module of a layer's linear projections and of its modules with fused experts."""
    modules = dict(layer.named_modules())
    for name, module in modules.items():
        part = _part(name)
        if _is_linear(module):
            is_gate = _GATE.search(name) and hasattr(modules[name.rpartition(".")[0]], "experts")
            if part is not None and not is_gate and not _ROUTER.search(name):
                yield name, part, module
        elif _EXPERTS.search(name) or part == "mlp":
            if _fused(module, among_experts=bool(_EXPERTS.search(name))):
                yield name, part or "mlp", module


def _expert_parts(model: nn.Module, modules: Sequence[tuple[str, nn.Module]]) -> dict[str, list[StoredPart]]:
    """The stored tensors of each module with fused experts, by the module's path.

    Raises:
        MaskingError: A parameter does not have three dimensions, or its storage layout is not supported.
    """
    parameters = {}
    for name, module in modules:
        for key, parameter in _fused(module, among_experts=True).items():
            if parameter.dim() != _FUSED_DIMENSIONS:
                raise MaskingError(
                    "Experts are fused in a form that masks do not support.",
                    key=f"{name}.{key}",
                    expected="parameters with three dimensions, the first of which is the expert",
                    actual=f"{tuple(parameter.shape)} in {type(module).__name__}",
                    hint="mask only the attention (--target attn)",
                )
            parameters[f"{name}.{key}"] = parameter
    found: dict[str, list[StoredPart]] = {}
    for name, parts in stored_parts(model, parameters).items():
        found.setdefault(name.rpartition(".")[0], []).extend(parts)
    return found


def _fused(module: nn.Module, *, among_experts: bool) -> dict[str, nn.Parameter]:
    """The parameters of a module that look like fused experts.

    Args:
        module: Not a linear projection; only its own parameters count, not those of its children.
        among_experts: Whether its path contains `experts`, so that two dimensions suffice; a router has two as well.
    """
    if isinstance(module, _ConvNd):
        return {}
    dimensions = _FUSED_DIMENSIONS - among_experts
    own = module.named_parameters(recurse=False)
    return {name: item for name, item in own if item.dim() >= dimensions and not name.endswith("bias")}


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _part(name: str) -> Literal["attn", "mlp"] | None:
    """`attn` or `mlp`, according to a module's path in its layer; None for anything else."""
    if _ATTENTION.search(name):
        return "attn"
    return "mlp" if _MLP.search(name) else None
