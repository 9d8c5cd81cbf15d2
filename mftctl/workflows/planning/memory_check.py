"""GPU memory check before loading weights, with advice if there is not enough."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mftctl.data.batching import any_images
from mftctl.data.encoding import Encoded
from mftctl.errors import DeviceMemoryError, ModelError
from mftctl.experiments.mask_train_options import MaskTrainOptions
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.run_device import device_for
from mftctl.experiments.run_folder import Run
from mftctl.experiments.training_options import TrainingOptions
from mftctl.masking.checkpoints.locate import is_adapter, resolve_checkpoint
from mftctl.masking.checkpoints.meta_models import count_layers, read_config
from mftctl.progress import Listener
from mftctl.runtime.peak_memory import restart_peak_memory
from mftctl.runtime.processes import spreads_parameters
from mftctl.runtime.torch_failures import gpu_failures
from mftctl.training.inputs import TrainingInputs
from mftctl.workflows.planning.command_memory import CommandMemory
from mftctl.workflows.planning.less_memory import probing_with_less_memory, training_with_less_memory
from mftctl.workflows.planning.memory import MemoryEstimate
from mftctl.workflows.planning.planned_device import PlannedDevice, this_device
from mftctl.workflows.planning.room import STOPPING_SHARE, Smaller, Verdict, judge


class RoomOnGpu:
    """Compares the memory needed by a training command with the free memory.

    Args:
        command: `fft`, `probe` or `mask-train`.
        recipe: The recipe of the command.
        listener: Receives a note if memory is tight.
    """

    def __init__(self, command: str, recipe: Recipe, listener: Listener) -> None:
        self._command = command
        self._recipe = recipe
        self._listener = listener
        self._memory: CommandMemory | None = None
        self._estimate: MemoryEstimate | None = None
        self._free_bytes = 0

    def require(self, inputs: TrainingInputs, validation: Sequence[Encoded] | None = None) -> None:
        """Checks that training may fit in free GPU memory; passes on a CPU and with sharded parameters.

        To be called before weights are loaded. The tokens of images count, but not the work of the vision tower.

        Args:
            inputs: The inputs of training.
            validation: The validation records, if not those of the inputs.

        Raises:
            DeviceMemoryError: It cannot fit, and the recipe does not disable the check.
        """
        device = this_device()
        if not device.is_gpu or device.free_bytes is None or spreads_parameters():
            return
        self._free_bytes = device.free_bytes
        try:
            self._memory = self._planned(inputs, device, inputs.validation if validation is None else validation)
            self._estimate = self._memory.estimate(self._recipe)
        except ModelError as error:  # an architecture that cannot run without data
            self._memory = None
            self._listener.note(f"Memory of this {self._command} was not estimated: {error.actual}")
            return
        needed = self._estimate.peak_bytes
        verdict = judge(needed, self._free_bytes)
        if verdict is Verdict.NO and self._recipe.check_memory:
            raise DeviceMemoryError(
                f"The GPU does not have the estimated memory for this {self._command}.",
                expected=f"{_gb(needed)} free",
                actual=_gb(self._free_bytes),
                hint=f"{self._advice(self._free_bytes)}; --no-check-memory to run anyway",
            )
        has_images = any_images(inputs.train)
        if verdict is not Verdict.FITS or has_images:
            without = " without the vision tower's work on images" if has_images else ""
            self._listener.note(
                f"Memory: {_gb(needed)} estimated{without}, {_gb(self._free_bytes)} free on the GPU. "
                "If it runs out, the error will show options that fit."
            )

    def hint(self) -> str | None:
        """Returns advice after the GPU ran out of memory; None without an estimate."""
        if self._memory is None or self._estimate is None:
            return None
        # The estimate was evidently too low; assume by the largest margin considered possible.
        return self._advice(int(min(self._free_bytes, self._estimate.peak_bytes) * STOPPING_SHARE))

    def _planned(self, inputs: TrainingInputs, device: PlannedDevice, validation: Sequence[Encoded]) -> CommandMemory:
        folder = inputs.checkpoint
        if is_adapter(folder):
            from mftctl.masking.checkpoints.locate import adapter_base

            folder = resolve_checkpoint(adapter_base(folder))
        config = read_config(str(folder))
        return CommandMemory(
            self._command,
            config,
            count_layers(config),
            device,
            train=inputs.train,
            validation=validation,
            seed=self._recipe.seed,
        )

    def _advice(self, free_bytes: int) -> str:
        found = None if self._memory is None else self._memory.smaller(self._recipe, free_bytes)
        return _options_text(found)


@contextmanager
def room_on_gpu(command: str, recipe: Recipe, listener: Listener) -> Iterator[RoomOnGpu]:
    """Context in which GPU out-of-memory errors name the smallest change of options that fits.

    Args:
        command: `fft`, `probe` or `mask-train`.
        recipe: The recipe of the command.
        listener: Receives a note if memory is tight.

    Raises:
        DeviceMemoryError: The GPU ran out of memory.
    """
    room = RoomOnGpu(command, recipe, listener)
    try:
        with gpu_failures(f"working on {command}"):
            yield room
    except DeviceMemoryError as error:
        error.hint = error.hint or room.hint()
        raise


@contextmanager
def training_on_device(
    command: str, recipe: Recipe, options: TrainingOptions, run: Run, listener: Listener
) -> Iterator[RoomOnGpu]:
    """Context in which a command trains on the recipe's device, with its peak memory reset.

    Args:
        command: `fft`, `probe` or `mask-train`.
        recipe: The recipe of the command.
        options: The recipe section for its training.
        run: The run of the command.
        listener: Receives messages about the device and its memory.

    Raises:
        ConfigError: As for `device_for`.
        DeviceMemoryError: The GPU does not have enough memory.
    """
    if command == "probe" and isinstance(options, MaskTrainOptions):
        less_memory = probing_with_less_memory(options)
    else:
        less_memory = training_with_less_memory(options)
    with (
        device_for(
            run,
            listener,
            less_memory=less_memory,
            deterministic=options.deterministic,
            device=recipe.device,
            attention=recipe.attention,
            precision=options.precision,
        ),
        room_on_gpu(command, recipe, listener) as room,
    ):
        restart_peak_memory()
        yield room


def _options_text(found: Smaller | None) -> str:
    if found is None:
        return "a smaller model or a larger GPU, as no change of options is enough"
    return f"{found.flags} (needs {_gb(found.needed_bytes)})"


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB"
