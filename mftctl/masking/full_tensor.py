"""Whole tensors of parameters that are sharded across processes."""

from __future__ import annotations

import torch


@torch.no_grad()
def whole(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter's values without gradient: the parameter itself, or gathered from all processes (ZeRO-3, FSDP2).

    Must be called in all processes at once.

    Args:
        parameter: Any parameter, sharded or not.
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
    """This process's part of a tensor: a view of its shard under FSDP2, otherwise the tensor itself."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
