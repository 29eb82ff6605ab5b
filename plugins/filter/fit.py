# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Filters of playbook fit.yml onto fit.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ansible.utils.display import Display
from ansible_collections.homelab.inference.plugins.plugin_utils import fit


def fit_answer(
    lab: dict[str, Any], asked: dict[str, Any], found: list[dict[str, Any]], problems: list[dict[str, str]]
) -> dict[str, str]:
    """Return the answer as text, or why there is none."""
    answered = fit.answer(lab, asked, found, problems)
    if answered["problem"]:
        return {"problem": answered["problem"], "text": ""}
    # Display leaves the last column of the terminal free.
    return {"problem": "", "text": fit.table(asked, answered, int(Display().columns) + 1)}


class FilterModule:
    """The filters by name."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return them."""
        return {"fit_answer": fit_answer, "fit_question": fit.question}
