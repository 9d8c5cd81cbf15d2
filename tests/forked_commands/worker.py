"""A worker process of a command that starts several, as that command starts it."""

from __future__ import annotations

import sys

from mftctl.workflows.multi_process.worker import main

if __name__ == "__main__":
    sys.exit(main())
