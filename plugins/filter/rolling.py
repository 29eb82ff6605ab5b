# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Filters of playbook restart.yml onto rolling.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.homelab.inference.plugins.plugin_utils import rolling


def restart_order(servers: list[dict[str, Any]], names: list[str] | str | None = None) -> list[dict[str, Any]]:
    """Return the servers in the order in which they are restarted; names may come from a command line, with commas."""
    if isinstance(names, str):
        names = [name.strip() for name in names.split(",") if name.strip()]
    try:
        return rolling.order(servers, names)
    except rolling.RollingError as error:
        raise AnsibleFilterError(str(error)) from error


class FilterModule:
    """The filters by name."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return them."""
        return {"restart_order": restart_order, "restart_refusals": rolling.refusals}
