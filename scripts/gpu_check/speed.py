"""Compares tokens per second of a mask step and a plain transformers fine-tuning step on the same model and data."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from scripts.gpu_check.findings import Finding, Measurement
from scripts.gpu_check.measuring import DEVICE, milliseconds
from scripts.gpu_check.random_models import random_inputs, random_model
from scripts.gpu_check.scale import Scale
from scripts.gpu_check.training_steps import mask_training


def mask_beside_fine_tuning(scale: Scale) -> Iterator[Finding]:
    """Uses the small model; plain transformers runs with autocast, fused AdamW and the model's own loss."""
    yield from mask_training(scale, scale.small, "mask step, small model", {"layers": scale.masked_layers})
    model = random_model(scale.small, torch.float32, emulated=scale.rehearses).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=not scale.rehearses)
    records = random_inputs(scale, scale.small, 1).train[: scale.records]
    ids = torch.tensor([record.input_ids for record in records], device=DEVICE)
    labels = torch.tensor([record.labels for record in records], device=DEVICE)

    def step() -> None:
        for _ in range(2):
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = model(input_ids=ids, labels=labels, use_cache=False).loss
            (loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    found = milliseconds(step, scale.steps)
    yield Measurement("fine-tuning step of plain transformers: step", found, "ms")
    yield Measurement("fine-tuning step of plain transformers: speed", 2 * ids.numel() / found * 1000, "tokens/s")
