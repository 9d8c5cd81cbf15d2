"""Names of the states of a model that a report compares."""

from __future__ import annotations

from mftctl.experiments.training_options import FftOptions, MaskTrainOptions

PRE_TRAINED = "pre-trained"
UNKNOWN = "unknown origin"
FFT = "FFT"
WRITTEN = "written outputs"
CONTINUED_FFT = "continued FFT"
_ROW_MASK = "L1 row mask"
_TUNED = {"full": FFT, "lora": "LoRA", "gmt": "GMT", "random": "random update", "hft": "HFT"}
_MASKED = {"random": "random mask", "magnitude": "L1 mask"}


def fine_tuned_state(source_state: str, options: FftOptions) -> str:
    """What fine-tuning makes of a source, such as FFT of a pre-trained model and continued FFT of a fine-tuned one."""
    name = _TUNED[options.method] + (" global" if options.scope == "global" else "")
    name += f" excluding {', '.join(sorted(options.exclude))}" if options.exclude else ""
    return name if source_state == PRE_TRAINED else f"continued {name}"


def mask_state(options: MaskTrainOptions) -> str:
    """What a mask makes of a model, in the words of the papers; with a preset `MFT, paper` or `MFT, reference`."""
    if options.method == "drop":
        return f"{options.strategy} drop"
    if options.method == "learned":
        if options.preset == "default":
            return "MFT"
        return f"MFT, {options.preset}" if options.threshold is None else "MFT threshold"
    return _ROW_MASK if options.unit == "row" else _MASKED[options.method]


STATE_ORDER = (
    PRE_TRAINED,
    UNKNOWN,
    FFT,
    "continued FFT",
    "LoRA",
    "continued LoRA",
    "HFT",
    "random update",
    "random update global",
    "GMT",
    "GMT global",
    "trivial drop",
    "salient drop",
    "random drop",
    "random mask",
    "L1 mask",
    "L1 row mask",
    "MFT, paper",
    "MFT, reference",
    "MFT",
    "MFT threshold",
    "masked",
)
