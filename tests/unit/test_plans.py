# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The documented labs are planned as their reviewed plans say. REWRITE_PLANS=1 writes those anew."""

from __future__ import annotations

import os

import pytest

from tests.plans import plans


@pytest.mark.parametrize("name", plans.SCENARIOS)
def test_a_lab_is_planned_as_reviewed(name: str) -> None:
    path = plans.HERE / f"{name}.plan.txt"
    planned = plans.render(plans.SCENARIOS[name])
    if os.environ.get("REWRITE_PLANS"):
        path.write_text(planned, encoding="utf-8")
    assert planned == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", plans.SCENARIOS)
def test_a_plan_adds_up(name: str) -> None:
    nodes, _resolved, plan = plans.make(plans.SCENARIOS[name])
    taken: dict[tuple[str, str], int] = {}
    for instance in plan["instances"]:
        itemised: dict[str, float] = {}
        for part in instance["parts"]:
            itemised[part["where"]] = itemised.get(part["where"], 0) + part["bytes"] / (1 << 20)
        assert instance["memory"].keys() >= itemised.keys()
        for where, size in instance["memory"].items():
            assert itemised.get(where, 0) <= size < itemised.get(where, 0) + 2
            taken[instance["node"], where] = taken.get((instance["node"], where), 0) + size
    for host, wheres in plan["devices"].items():
        kinds = {device["id"]: device["memory_kind"] for device in nodes[host]["devices"]}
        shared = sum(taken.get((host, where), 0) for where, kind in kinds.items() if kind == "unified")
        for where, sizes in wheres.items():
            # What a unified GPU takes, main memory has no longer.
            wanted = taken.get((host, where), 0) + (shared if where == "host" else 0)
            assert sizes["planned_mib"] == wanted
            assert sizes["left_mib"] >= 0
            assert sizes["reserved_mib"] + sizes["others_mib"] + wanted + sizes["left_mib"] <= sizes["size_mib"]
