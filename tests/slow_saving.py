"""A training whose first process takes longer to save than the others may wait in a step."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any

import torch.distributed
from torch.distributed.distributed_c10d import _set_pg_timeout

from mftctl.cli.app import build_app
from mftctl.runtime.process_group import join, leave
from mftctl.runtime.processes import is_first, timeout_seconds
from mftctl.training.score_trainer import ScoreTrainer

ALLOWED_SECONDS = 2
SAVING_SECONDS = 5
save = ScoreTrainer._save


def save_slowly(self: ScoreTrainer, *arguments: Any, **options: Any) -> None:
    if is_first():
        time.sleep(SAVING_SECONDS)
    save(self, *arguments, **options)


if __name__ == "__main__":
    join()
    group = torch.distributed.group.WORLD
    made_with = group._get_backend(torch.device("cpu")).options._timeout
    if made_with != timedelta(seconds=timeout_seconds()):
        sys.exit(f"the group was made with {made_with}")
    _set_pg_timeout(timedelta(seconds=ALLOWED_SECONDS), group)
    ScoreTrainer._save = save_slowly  # type: ignore[method-assign]
    build_app()(sys.argv[1:], standalone_mode=False)
    leave()
