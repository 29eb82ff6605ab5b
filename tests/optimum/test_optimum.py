# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Plans against the best there is, on made-up labs of up to six models and six devices.

pytest tests/optimum               500 labs: about half an hour on two cores
OPTIMUM_LABS=40 pytest tests/optimum
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import exact
import fleets
from ansible_collections.homelab.inference.plugins.module_utils.placement import plan

LABS = int(os.environ.get("OPTIMUM_LABS", "500"))
# Value of a plan over that of the best, on every lab; and how many have to be the best.
LEAST, EQUAL = 0.98, 0.95


def changed(fleet: fleets.Fleet, number: int) -> fleets.Fleet:
    """Return the lab with a small change: a model less, a card that others use more of, or another priority."""
    models, nodes = dict(fleet.models), dict(fleet.nodes)
    name = list(models)[number % len(models)]
    kind = number % 3
    if kind == 0 and len(models) > 1:
        del models[name]
    elif kind == 1:
        host = list(nodes)[number % len(nodes)]
        devices = [{**device, "used_mib": device["used_mib"] + 3000} for device in nodes[host]["devices"]]
        nodes[host] = {**nodes[host], "devices": devices}
    else:
        models[name] = {**models[name], "priority": 100}
    return fleets.Fleet(models, {name: fleet.resolved[name] for name in models}, nodes)


def test_plans_are_worth_what_the_best_is_worth() -> None:
    found = {}
    for number in range(LABS):
        fleet = fleets.small(number)
        made = plan(fleet.models, fleet.resolved, fleet.nodes, [])
        assert exact.broken(fleet, made) == [], number
        best = exact.Program(fleet).best()
        found[number] = made["value"] / best if best else 1.0
        assert found[number] <= 1 + 1e-5, number
    equal = sum(part >= 1 - 2e-6 for part in found.values()) / LABS
    worst = min(found, key=found.get)
    print(f"{LABS} labs: {equal:.1%} are the best, the worst ({worst}) has {found[worst]:.4f}")
    assert found[worst] >= LEAST and equal >= EQUAL


def test_a_small_change_moves_as_little_as_it_can() -> None:
    found = {}
    for number in range(LABS):
        before = fleets.small(number)
        first = plan(before.models, before.resolved, before.nodes, [])["instances"]
        after = changed(before, number)
        made = plan(after.models, after.resolved, after.nodes, first)
        assert exact.broken(after, made) == [], number
        moved = exact.moves(first, made["instances"], after.models)
        found[number] = moved - exact.Program(after).least_moves(first, made["value"]) if moved > 1 else 0
    print(f"{LABS} labs: at most {max(found.values())} moves more than have to be")
    assert max(found.values()) <= 1, found
