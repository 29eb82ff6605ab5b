# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Holds what a node says of itself against the lock: a GPU that is away is drift, never a new truth, and memory that
others hold counts anew only when it changed by more than it always does.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

# Shares of a GPU's and of a node's memory by which the use of others may go up and down without a new plan. A desktop
# moves by some ten MiB on a card, and by some hundred on a node.
DEVICE_TOLERANCE = 0.02
NODE_TOLERANCE = 0.05


def identity(device: dict[str, Any]) -> str:
    """Return what tells a GPU from others: its UUID, else its PCI address, else its id (unified memory has neither)."""
    return device.get("uuid") or device.get("pci") or device["id"]


def bind(
    found: list[dict[str, Any]], locked: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return C((devices, missing)): every GPU of the lock under the id it has there, new ones under the next free ids.

    A GPU of the lock that was not found stays among the devices, as the lock knows it, and is also in C(missing).
    """
    there = {identity(device): device for device in found}
    devices = [{**there.pop(identity(known), known), "id": known["id"]} for known in locked]
    missing = [known for known in locked if identity(known) not in {identity(device) for device in found}]
    taken = {known["id"] for known in locked}
    free = (name for name in (f"gpu{number}" for number in itertools.count()) if name not in taken)
    return devices + [{**device, "id": next(free)} for device in there.values()], missing


def of_others(used: int, ours: int, known: int | None, tolerance: float) -> int:
    """Return how many MiB others hold of a memory: what is used now without what is ours, or what the lock says as long
    as that is about the same.

    :param known: what the lock says, None where it says nothing.
    :param tolerance: MiB by which the two may differ.
    """
    now = max(used - ours, 0)
    return known if known is not None and abs(now - known) <= tolerance else now


def share(
    facts: dict[str, Any], before: dict[str, Any], ours: dict[str, int], missing: Iterable[str] = ()
) -> dict[str, Any]:
    """Return a node's facts with the memory that others hold in C(used_mib) of each device and in C(memory_used_mib).

    :param facts: C({devices, memory_mib, memory_used_mib, ...}), with all that is used now.
    :param before: the node as the lock knows it, empty where it does not.
    :param ours: MiB that our running servers were planned with, by device id and C(host).
    :param missing: ids of the devices that did not answer; what the lock says of them stays.
    """
    locked = {device["id"]: device for device in before.get("devices", [])}
    devices = []
    for device in facts["devices"]:
        used = device.get("used_mib")
        if used is not None and device["id"] not in missing:
            known = locked.get(device["id"], {}).get("used_mib")
            used = of_others(used, ours.get(device["id"], 0), known, DEVICE_TOLERANCE * device["memory_mib"])
        devices.append({**device, "used_mib": used})
    used = facts["memory_used_mib"]
    if used is not None:
        tolerance = NODE_TOLERANCE * facts["memory_mib"]
        used = of_others(used, ours.get("host", 0), before.get("memory_used_mib"), tolerance)
    return {**facts, "devices": devices, "memory_used_mib": used}
