# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Holds what a node says of its GPUs against the lock: a GPU that is away is drift, never a new truth."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any


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


def without_ours(
    facts: dict[str, Any],
    ours: dict[str, int],
    missing: Iterable[str] = (),
    before: dict[str, int | None] | None = None,
) -> dict[str, Any]:
    """Return a node's facts with the memory that others hold in C(used_mib) of each device and in C(memory_used_mib).

    :param facts: C({devices, memory_mib, memory_used_mib, ...}), with all that is used now.
    :param ours: MiB that our running servers were planned with, by device id and C(host).
    :param missing: ids of the devices that did not answer; what the lock says of them stays.
    :param before: MiB that others held by the lock, where it cannot be told now: models take turns there.
    """

    def others(used: int | None, where: str) -> int | None:
        if before and where in before:
            return before[where]
        return used if used is None or where in missing else max(used - ours.get(where, 0), 0)

    devices = [{**device, "used_mib": others(device.get("used_mib"), device["id"])} for device in facts["devices"]]
    return {**facts, "devices": devices, "memory_used_mib": others(facts["memory_used_mib"], "host")}
