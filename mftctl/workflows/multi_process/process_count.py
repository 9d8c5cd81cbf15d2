"""Number of processes of a command, and the kind of sharding across them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec

from mftctl.errors import ConfigError
from mftctl.runtime.processes import INSTALL_DEEPSPEED, world_size


class Shard(StrEnum):
    """Kinds of sharding, named after the configurations in `recipes/accelerate`."""

    DDP = "ddp"
    ZERO2 = "zero2"
    ZERO3 = "zero3"
    FSDP2 = "fsdp2"


@dataclass(frozen=True, slots=True)
class Launch:
    """Processes of a command, as requested on the command line.

    Attributes:
        processes: The number of processes on this machine; 1 means the command's own process.
        shard: Kind of sharding during training.
    """

    processes: int = 1
    shard: Shard = Shard.DDP

    @property
    def words(self) -> tuple[str, ...]:
        """The command-line options for this launch."""
        if self.processes == 1:
            return ()
        spread = () if self.shard is Shard.DDP else ("--shard", self.shard.value)
        return ("--processes", str(self.processes), *spread)


def settle_launch(command: str, processes: int | None, shard: Shard | None) -> Launch:
    """Returns the launch requested by two options, if this machine supports it.

    Args:
        command: The mftctl command.
        processes: The value of `--processes`; None for one.
        shard: The value of `--shard`; None for plain data parallelism.

    Raises:
        ConfigError: The launch is not possible.
    """
    if processes is None and shard is None:
        return Launch()
    if world_size() > 1:
        raise ConfigError(
            "The processes have already been started.",
            key="--processes" if processes is not None else "--shard",
            expected=f"mftctl {command} --processes N, without accelerate launch or torchrun",
            actual=f"WORLD_SIZE {world_size()}",
        )
    launch = Launch(processes or 1, shard or Shard.DDP)
    if launch.processes == 1:
        if launch.shard is not Shard.DDP:
            raise ConfigError(
                "--shard needs several processes.",
                key="--processes",
                expected=f"2 or more with --shard {launch.shard}",
                actual=launch.processes,
            )
        return launch
    if command == "eval" and launch.shard is not Shard.DDP:
        raise ConfigError(
            "An evaluation cannot shard the model: processes divide the problems among them.",
            key="--shard",
            expected=Shard.DDP.value,
            actual=launch.shard.value,
            hint="omit --shard",
        )
    _require_libraries(launch)
    return launch


def require_devices(launch: Launch, device: str) -> None:
    """Checks that every process can have its own device.

    Args:
        launch: The launch of a command.
        device: The device as in a recipe.

    Raises:
        ConfigError: There are too few GPUs, or one of them was selected by number.
    """
    if launch.processes == 1:
        return
    if ":" in device:
        raise ConfigError(
            "Each process needs its own GPU.",
            key="--device",
            expected="cuda, to use the first GPUs",
            actual=device,
            hint="CUDA_VISIBLE_DEVICES to select the GPUs",
        )
    _require_enough(launch, device)


def _require_libraries(launch: Launch) -> None:
    if launch.shard in (Shard.ZERO2, Shard.ZERO3) and find_spec("deepspeed") is None:
        raise ConfigError(
            "ZeRO needs DeepSpeed, which is not installed.",
            key="--shard",
            actual=launch.shard.value,
            hint=f"{INSTALL_DEEPSPEED}, or use --shard ddp or fsdp2",
        )


def _require_enough(launch: Launch, device: str) -> None:
    import torch

    gpus = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    if gpus and launch.processes > gpus:
        raise ConfigError(
            "Each process needs its own GPU.",
            key="--processes",
            expected=f"at most {gpus}",
            actual=launch.processes,
        )
    if not gpus and launch.shard is Shard.FSDP2:
        raise ConfigError(
            "accelerate supports FSDP only on GPUs.",
            key="--shard",
            expected="ddp, zero2 or zero3 on a CPU",
            actual=launch.shard.value,
        )
