"""With how many processes a command works, and what they spread over each other."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec

from mftctl.errors import ConfigError
from mftctl.runtime.processes import world_size


class Shard(StrEnum):
    """What is spread over the processes, by the name of the configuration in `recipes/accelerate`."""

    DDP = "ddp"
    ZERO2 = "zero2"
    ZERO3 = "zero3"
    FSDP2 = "fsdp2"


@dataclass(frozen=True, slots=True)
class Launch:
    """How a command is started.

    Attributes:
        processes: On this machine; 1 works in the command's own.
        shard: What they spread over each other while they train.
    """

    processes: int = 1
    shard: Shard = Shard.DDP

    @property
    def words(self) -> tuple[str, ...]:
        """The options that say so."""
        if self.processes == 1:
            return ()
        spread = () if self.shard is Shard.DDP else ("--shard", self.shard.value)
        return ("--processes", str(self.processes), *spread)


def settle_launch(command: str, processes: int | None, shard: Shard | None) -> Launch:
    """The launch that two options ask for, if this machine can do it.

    Args:
        command: Of mftctl.
        processes: From `--processes`; None for one.
        shard: From `--shard`; None for plain data parallelism.

    Raises:
        ConfigError: It cannot.
    """
    if processes is None and shard is None:
        return Launch()
    if world_size() > 1:
        raise ConfigError(
            "The processes have been started already.",
            key="--processes" if processes is not None else "--shard",
            expected=f"mftctl {command} --processes N, without accelerate launch or torchrun",
            actual=f"WORLD_SIZE {world_size()}",
        )
    launch = Launch(processes or 1, shard or Shard.DDP)
    if launch.processes == 1:
        if launch.shard is not Shard.DDP:
            raise ConfigError(
                "There is nobody to spread anything over.",
                key="--processes",
                expected=f"2 or more with --shard {launch.shard}",
                actual=launch.processes,
            )
        return launch
    if command == "eval" and launch.shard is not Shard.DDP:
        raise ConfigError(
            "An evaluation shares out its problems, and each process has the whole model.",
            key="--shard",
            expected=Shard.DDP.value,
            actual=launch.shard.value,
            hint="leave --shard out",
        )
    _require_libraries(launch)
    return launch


def require_devices(launch: Launch, device: str) -> None:
    """Nothing, if every process can have a device of its own.

    Args:
        launch: Of a command.
        device: As in a recipe.

    Raises:
        ConfigError: There are too few GPUs, or one of them was chosen by its number.
    """
    if launch.processes == 1:
        return
    if ":" in device:
        raise ConfigError(
            "Each process needs a GPU of its own.",
            key="--device",
            expected="cuda, on whose first GPUs the processes work",
            actual=device,
            hint="CUDA_VISIBLE_DEVICES chooses which GPUs there are",
        )
    _require_enough(launch, device)


def _require_libraries(launch: Launch) -> None:
    if launch.shard in (Shard.ZERO2, Shard.ZERO3) and find_spec("deepspeed") is None:
        raise ConfigError(
            "ZeRO is DeepSpeed's, which is not installed.",
            key="--shard",
            actual=launch.shard.value,
            hint="pip install 'mftctl[deepspeed]'",
        )


def _require_enough(launch: Launch, device: str) -> None:
    import torch

    gpus = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    if gpus and launch.processes > gpus:
        raise ConfigError(
            "Each process needs a GPU of its own.",
            key="--processes",
            expected=f"at most {gpus}",
            actual=launch.processes,
        )
    if not gpus and launch.shard is Shard.FSDP2:
        raise ConfigError(
            "accelerate uses FSDP on GPUs alone.",
            key="--shard",
            expected="ddp, zero2 or zero3 on a CPU",
            actual=launch.shard.value,
        )
