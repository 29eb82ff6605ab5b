# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Filters of the playbooks onto report.py and report_page.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from ansible.utils.display import Display
from ansible_collections.homelab.inference.plugins.plugin_utils import report, report_page


def columns() -> int:
    """Return the width of the terminal; Display leaves the last column free."""
    return int(Display().columns) + 1


def plan_table(plan: dict[str, Any], before: dict[str, Any] | None = None) -> str:
    """Return a plan as text for people."""
    return report.table(plan, before, columns())


def plan_document(plan: dict[str, Any], before: dict[str, Any] | None = None) -> str:
    """Return a plan as JSON text: the same plan gives the same bytes."""
    return json.dumps(report.document(plan, before), indent=2, ensure_ascii=False) + "\n"


class FilterModule:
    """The filters by name."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return them."""
        return {"plan_document": plan_document, "plan_page": report_page.page, "plan_table": plan_table}
