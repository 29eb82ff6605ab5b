# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A few of the labs of tests/optimum: plans keep the rules, are worth what the best is worth, and stay as they are."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from ansible_collections.homelab.inference.plugins.module_utils.placement import plan

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "optimum"))

import exact
import fleets


@pytest.mark.parametrize("number", [3, 4, 8, 17, 34, 35])
def test_a_made_up_lab(number: int) -> None:
    fleet = fleets.small(number)
    made = plan(fleet.models, fleet.resolved, fleet.nodes, [])
    assert exact.broken(fleet, made) == []
    best = exact.Program(fleet).best()
    assert 0.98 * best - 1e-6 <= made["value"] <= best + 1e-4
    assert plan(fleet.models, fleet.resolved, fleet.nodes, made["instances"]) == made
