# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run a vendor's tool under a deadline that holds even when the driver does not."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

# A process that merely was slow is gone by then.
GRACE = 1.0


class Answer(NamedTuple):
    """What a tool printed, or why it printed nothing."""

    rc: int | None
    output: str
    hung: str | None = None


def run(argv: list[str], deadline: float) -> Answer:
    """Run argv for at most deadline seconds.

    A child in uninterruptible sleep survives SIGKILL, and waiting for it (as subprocess.run does after its timeout)
    would hang this process too. So it is polled, killed, and left behind when it does not die. Its output goes to
    a file: the writer of a full pipe would wait for us, and we for it.
    """
    with tempfile.TemporaryFile() as output:
        try:
            # AnsibleModule.run_command waits for its child, however long that takes.
            child = subprocess.Popen(  # pylint: disable=ansible-bad-function
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "LC_ALL": "C"},
                start_new_session=True,
            )
        except OSError as exc:
            return Answer(None, str(exc))
        hung = None
        if not _ended(child, deadline):
            child.kill()
            hung = f"{argv[0]} gave no answer in {deadline:g} s"
            if not _ended(child, GRACE):
                hung += f", and its process {child.pid} (state {_state(child.pid)}) survives SIGKILL"
        output.seek(0)
        return Answer(child.returncode, output.read().decode("utf-8", "replace"), hung)


def _ended(child: subprocess.Popen, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while child.poll() is None:
        if time.monotonic() >= end:
            return False
        time.sleep(0.02)
    return True


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "unknown"
