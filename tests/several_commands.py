"""Several mftctl commands in the processes of one launch, whose start takes longer than a tiny training does."""

import shlex
import sys

from accelerate.state import AcceleratorState

from mftctl.cli.app import build_app
from mftctl.processes import leave

if __name__ == "__main__":
    for line in sys.argv[1:]:
        build_app()(shlex.split(line), standalone_mode=False)
        AcceleratorState._reset_state(True)  # it keeps what the first command configured
    leave()
