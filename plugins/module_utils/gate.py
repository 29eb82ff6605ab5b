# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The start gate of a host: one GPU server starts at a time, and the next one only when it is ready or given up.

The kernel drops the lock with the process that holds it, so nothing has to be cleaned up after a crash.
This file is also copied to the nodes, beside the node program: it imports nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Callable

LOCK = Path("/run/homelab-inference/start.lock")

POLL_S = 0.2


class GateError(Exception):
    """The start lock was not to be had."""


@contextlib.contextmanager
def start_gate(
    path: Path, holder: str, action: str, deadline_s: float, waiting: Callable[[dict[str, Any]], None]
) -> Iterator[None]:
    """Hold the start lock; the one who waits is told who has it, and again whenever that changes."""
    deadline = time.monotonic() + deadline_s
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        told: dict[str, Any] | None = None
        while not _taken(descriptor):
            other = _content(descriptor)
            if other and other != told:
                waiting(other)
                told = other
            if time.monotonic() >= deadline:
                raise GateError(f"Waiting for the start lock {path}: {describe(other)} for more than {deadline_s:g} s.")
            time.sleep(POLL_S)
        since = datetime.now(timezone.utc).isoformat(timespec="seconds")
        _write(descriptor, json.dumps({"holder": holder, "action": action, "since": since}))
        try:
            yield
        finally:
            _write(descriptor, "")
    finally:
        os.close(descriptor)


def holder_of(path: Path) -> dict[str, Any] | None:
    """Who holds the start lock now: holder, action, since."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        return None if _taken(descriptor) else _content(descriptor)
    finally:
        os.close(descriptor)


def describe(holder: dict[str, Any]) -> str:
    """One phrase for people."""
    if not holder:
        return "somebody who did not say who they are holds it"
    return f"{holder['holder']} holds it to {holder['action']} since {holder['since']}"


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _content(descriptor: int) -> dict[str, Any]:
    try:
        return json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:  # taken, but not yet written
        return {}


def _write(descriptor: int, text: str) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)
