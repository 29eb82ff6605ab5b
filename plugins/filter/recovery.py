# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Filters of playbook recover.yml onto recovery.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ansible_collections.homelab.inference.plugins.plugin_utils import recovery


class FilterModule:
    """The filters by name."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return them."""
        return {
            "recovery_person": recovery.person,
            "recovery_rungs": recovery.rungs,
            "recovery_summary": recovery.summary,
        }
