# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Filters of the playbooks onto planning.py and lock.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from ansible_collections.homelab.inference.plugins.plugin_utils import lock, planning, views


def lock_text(value: dict[str, Any]) -> str:
    """Return the lock as text; by way of JSON, because YAML does not know Ansible's own string types."""
    return lock.render(json.loads(json.dumps(value)))


class FilterModule:
    """The filters by name."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return them."""
        return {
            "lock_text": lock_text,
            "make_lock": planning.make_lock,
            "model_sources": planning.sources,
            "planned_images": views.planned_images,
            "resolve_models": planning.resolve,
            "unresolved_models": planning.unresolved,
        }
