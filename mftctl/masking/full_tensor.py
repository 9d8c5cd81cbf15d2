"""Parameters of which each process holds a part, as whole tensors."""

from __future__ import annotations

import torch


@torch.no_grad()
def whole(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter's values, without gradient: itself, or under ZeRO-3 and FSDP2 a tensor gathered from all processes.

    To be called in all processes at once.

    Args:
        parameter: Of any kind.
    """
    if getattr(parameter, "ds_numel", parameter.numel()) != parameter.numel():
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    from torch.distributed.tensor import DTensor

    if isinstance(parameter, DTensor):
        return parameter.full_tensor().detach()
    return parameter.detach()


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """The shape of a parameter's whole values."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process has of a tensor: a view of its part under FSDP2, else the tensor."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
