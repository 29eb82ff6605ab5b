# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The lab lock: of the playbooks that change a lab one runs at a time.

A file beside the plan, C(.lab.running)::

    {"pid": of ansible-playbook, "began": when that process began, "what": "site.yml", "since": ISO time}

It belongs to the process that it names and is free when that one has ended, however it ended: nobody has to take it
away.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from ansible_collections.homelab.inference.plugins.plugin_utils import lock


def path(lock_path: Path) -> Path:
    """Return the file for the lab with this lock."""
    return lock.beside(lock_path, ".running")


def take(file: Path, what: str, pid: int) -> dict[str, Any] | None:
    """Take it for a process; return None, or who has it.

    :param what: what people know the run by, like C(site.yml).
    :raises OSError: the file may not be written.
    """
    with os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT, 0o600), "r+", encoding="utf-8") as handle:
        # For the moment of looking and writing alone.
        fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            holder = json.loads(handle.read() or "{}")
        except ValueError:
            holder = {}
        if holder.get("pid") != pid and holder.get("began") and began(holder["pid"]) == holder["began"]:
            return dict(holder)
        since = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        handle.seek(0)
        handle.truncate()
        handle.write(json.dumps({"pid": pid, "began": began(pid), "what": what, "since": since}) + "\n")
    return None


def began(pid: int) -> str:
    """Return when a process began, as the system tells it; empty where there is no such process."""
    try:
        # The 22nd word, after the name in brackets, which may hold anything: ticks since the machine started.
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return "" if stat[0] == "Z" else f"{boot} {stat[19]}"
    except OSError:
        if Path("/proc/self/stat").exists():
            return ""
    # macOS
    done = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return done.stdout.strip()
