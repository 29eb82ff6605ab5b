# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which nodes their owner has taken out of service for a while.

A file beside the plan, C(.lab.maintenance.json), that maintenance.yml writes: C({NODE: until}), with the end as ISO
time. It ends by itself: what is over counts as if it were not there.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path

from ansible_collections.homelab.inference.plugins.plugin_utils import lock


def path(lock_path: Path) -> Path:
    """Return the file for the lab with this lock."""
    return lock.beside(lock_path, ".maintenance.json")


def read(file: Path, now: datetime.datetime) -> dict[str, str]:
    """Return the nodes in maintenance, and until when; none where the file is missing or cannot be read."""
    found = {}
    try:
        for host, until in dict(json.loads(file.read_text(encoding="utf-8"))).items():
            if datetime.datetime.fromisoformat(until) > now:
                found[str(host)] = until
    except (OSError, ValueError, TypeError):
        return {}
    return found
