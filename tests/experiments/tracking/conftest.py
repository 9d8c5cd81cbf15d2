"""Keeps what the real trackers write in temporary folders."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="mftctl-test-trackio-")  # read when trackio is imported
atexit.register(shutil.rmtree, os.environ["TRACKIO_DIR"], ignore_errors=True)
