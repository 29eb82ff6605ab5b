# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How a long module says how far it is: a small JSON file on the node, which its action plugin reads."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

# Rewriting more often would not show: the action plugin looks every two seconds and prints every five.
INTERVAL = 0.5


class ProgressFile:
    """Keeps the progress file; without a path (the module was started by itself) it does nothing.

    A context manager: the file is there from the start, so that the watcher knows the process, and is gone at the end.
    """

    def __init__(self, path: str | None) -> None:
        self.path = Path(path) if path else None
        self._phase: str | None = None
        self._written = 0.0

    def __enter__(self) -> ProgressFile:
        self.report("")
        return self

    def __exit__(self, *_exc: object) -> None:
        if self.path:
            with contextlib.suppress(OSError):
                self.path.unlink()

    def report(self, phase: str, done: int | None = None, total: int | None = None, unit: str | None = None) -> None:
        """Say what is being done ("copying chat.gguf") and how far it is. Only a new phase is written at once."""
        now = time.monotonic()
        if not self.path or (phase == self._phase and now - self._written < INTERVAL):
            return
        self._phase, self._written = phase, now
        state = {"pid": os.getpid(), "phase": phase, "done": done, "total": total, "unit": unit}
        partial = self.path.with_name(self.path.name + ".tmp")
        # Work is never lost for want of a progress line: a full disk is for the work itself to report.
        with contextlib.suppress(OSError):
            partial.write_text(json.dumps(state), encoding="utf-8")
            partial.replace(self.path)
